"""Whole PPO iterations beside TRL's: the same model, text prompts and reward, each contestant in a process of its own.

The model is of shape `tiny` (4 layers, width 256, vocabulary 4,096) in float32 on two threads. An iteration generates 32 replies
of 64 tokens to prompts of unequal length, rewards them by a program, and trains 4 epochs of 4 mini-batches, each a step:

    ppo       32 prompts; a critic of its own; beside TRL 1.12.0's `trl.experimental.ppo`, the last release that has PPO
    shared    the same with the critic on the policy's trunk: another algorithm, of which TRL has none, beside the same peer
    rloo      8 prompts with 4 replies each, leave-one-out baseline, no critic; beside TRL 1.16.0's RLOO

Iterations alternate between the contestants, so that what else the machine does hits all alike; a ratio is formed within each
round. TRL's environments are made by `--make-peer` (`peer_environment`). A mean reward is reported of each: the same weights and
the same reward have to come to about the same.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tokenizers

import step_megatron
from step_megatron.benchmarks import peer_environment, ppo_ours
from step_megatron.benchmarks.ppo_job import Job, Report
from step_megatron.benchmarks.spread import spread
from step_megatron.conversion.live import write_decoder
from step_megatron.data.rl_prompts import RLPrompt, write_rl_prompts
from step_megatron.data.schema import Text, Turn
from step_megatron.data.template import TEMPLATES
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.generation.rendering import Rendering
from step_megatron.model.audio_lm import build_model
from step_megatron.rl.sampling import conversation_of
from step_megatron.runtime.device import initialize, shutdown

_REPLIES, _SAMPLES = 32, 4
# Words of a prompt, of some three tokens each.
_WORDS = (3, 48)
_SYLLABLES = [first + vowel for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_PEERS = {"ppo": "1.12.0", "rloo": "1.16.0"}
# Of a contestant: the job's algorithm, and whether it is ours.
_OURS = ("ppo", "shared", "rloo")


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `make_peer` (make the peers' environments first).

    Returns:
        `{"name", "ratio", "low", "high", "ratio_shared", ..., "ratio_rloo", ..., "contestants", "load", ...}`: `ratio` is the
        time of TRL's PPO iteration over ours (median, lowest and highest round), `ratio_shared` the same peer's over ours with a
        shared trunk, `ratio_rloo` that of TRL's RLOO over ours, `ratio_cpu`, ... the same by CPU time; `contestants` holds, of
        each, `seconds`, `phases`, `reward`, and resident memory in MiB (`start` before the first iteration, `peak`).

    Raises:
        PeerError: an environment is missing, or could not be made.
        RuntimeError: a contestant ended by itself.
    """
    if options.make_peer:
        for release in _PEERS.values():
            peer_environment.make(release)
    interpreters = {f"TRL {name}": peer_environment.python(release) for name, release in _PEERS.items()}
    load = os.getloadavg()[0]
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        jobs = prepare(folder)
        paths = {name: job.write(folder / f"{name}.json") for name, job in jobs.items()}
        commands = {f"ours {name}": _command(sys.executable, "ppo_ours", paths[name]) for name in _OURS}
        commands |= {
            name: _command(str(python), "ppo_peer", paths[name.removeprefix("TRL ")]) for name, python in interpreters.items()
        }
        contestants = {name: ending.enter_context(_contestant(name, command)) for name, command in commands.items()}
        for each in contestants.values():
            # Not counted: what is allocated, compiled and cached once.
            each.iteration()
        rounds = [{name: each.iteration() for name, each in contestants.items()} for _ in range(options.repeats)]
    return _report(rounds, jobs, (load, os.getloadavg()[0]))


def prepare(folder: Path) -> dict[str, Job]:
    """Write tokenizer, prompts and weights; the job of each algorithm."""
    _write_tokenizer(folder / "tokenizer")
    prompts = _prompts(_REPLIES)
    for count in (_REPLIES, _REPLIES // _SAMPLES):
        write_rl_prompts(folder / ppo_ours.PROMPTS.format(count), prompts[:count])
    config = ppo_ours.settings(folder)
    initialize(config)
    try:
        (model,) = build_model(config)
        (folder / "policy").mkdir()
        write_decoder(folder / "policy", model, config)
    finally:
        shutdown()
    rendering = Rendering(Tokenizer.load(folder / "tokenizer"), config.tokenizer)
    tokenizer = rendering.tokenizer
    ids = [rendering.sample(conversation_of(prompt, False), lambda clip: []).input_ids.tolist() for prompt in prompts]
    scores = [float(tokenizer.decode([token]).count(ppo_ours.LETTER)) for token in range(config.model.vocabulary_size)]
    end = tokenizer.special(TEMPLATES[config.tokenizer.template].close)

    def job(algorithm: str) -> Job:
        samples = _SAMPLES if algorithm == "rloo" else 1
        return Job(algorithm, str(folder), ids[: _REPLIES // samples], samples, tokenizer.pad_id, end, scores)

    return {algorithm: job(algorithm) for algorithm in _OURS}


def _prompts(count: int) -> list[RLPrompt]:
    generator = random.Random(0)
    texts = [" ".join(_words(generator, generator.randint(*_WORDS))) for _ in range(count)]
    return [RLPrompt(f"p{i}", "bench", (Turn("human", (Text(text),)),), reference="") for i, text in enumerate(texts)]


def _words(generator: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        yield "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 4)))


def _write_tokenizer(folder: Path) -> None:
    """Byte-level BPE over made-up words, with as many ids as the model has."""
    folder.mkdir()
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=list(_SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator((" ".join(_words(random.Random(i), 20)) for i in range(2000)), trainer)
    encoder.save(str(folder / "tokenizer.json"))


def _command(python: str, module: str, job: Path) -> list[str]:
    return [python, "-m", f"step_megatron.benchmarks.{module}", str(job)]


class _Contestant:
    """A process that does an iteration when it is told to."""

    def __init__(self, name: str, process: subprocess.Popen):
        self.name, self._process = name, process

    def iteration(self) -> Report:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; its own words stand above")
        return Report(**json.loads(line))


@contextmanager
def _contestant(name: str, command: Sequence[str]) -> Iterator[_Contestant]:
    root = str(Path(step_megatron.__file__).parent.parent)
    # The peers' Python finds what they import of ours, and no package of this environment.
    environment = os.environ | ({} if command[0] == sys.executable else {"PYTHONPATH": root})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield _Contestant(name, process)
        finally:
            process.kill()


def _report(rounds: list[dict[str, Report]], jobs: dict[str, Job], load: tuple[float, float]) -> dict:
    job = jobs["ppo"]
    lengths = [len(tokens) for tokens in job.prompts]
    print(
        f"{job.replies} replies of {job.new_tokens} tokens to prompts of {min(lengths)}-{max(lengths)}, {job.epochs} epochs of "
        f"{job.mini_batches} mini-batches, {job.threads} threads, load {load[0]:.1f}-{load[1]:.1f}; seconds an iteration, "
        f"median of {len(rounds)} (lowest-highest)"
    )
    told = {}
    for name in rounds[0]:
        reports = [each[name] for each in rounds]
        start, peak = reports[-1].start, reports[-1].peak
        seconds = [each.seconds for each in reports]
        phases = {phase: statistics.median(each.phases.get(phase, 0.0) for each in reports) for phase in reports[0].phases}
        reward = statistics.mean(each.reward for each in reports)
        told[name] = {"seconds": statistics.median(seconds), "phases": phases, "reward": reward, "start": start, "peak": peak}
        print(f"  {name:12} {spread(seconds)}; reward {reward:.3f}; {peak - start:.0f} MiB above the {start:.0f} at the start")
        print("               " + ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items()))
    result: dict = {"name": "ppo"}
    for suffix, ours, peer in (("", "ppo", "ppo"), ("_shared", "shared", "ppo"), ("_rloo", "rloo", "rloo")):
        pairs = [(each[f"TRL {peer}"], each[f"ours {ours}"]) for each in rounds]
        ratios = [theirs.seconds / mine.seconds for theirs, mine in pairs]
        cpu = [theirs.cpu_seconds / mine.cpu_seconds for theirs, mine in pairs]
        print(f"  TRL {peer} / ours {ours}: {spread(ratios)}; by CPU time {spread(cpu)}")
        result |= {f"ratio{suffix}": statistics.median(ratios), f"low{suffix}": min(ratios), f"high{suffix}": max(ratios)}
        result |= {f"ratio{suffix}_cpu": statistics.median(cpu)}
    return result | {"contestants": told, "rounds": len(rounds), "threads": job.threads, "load": load}
