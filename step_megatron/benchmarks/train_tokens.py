"""Tokens a second of training a decoder on conversations of real lengths, beside transformers' `Trainer` on the same weights.

Every pass is one AdamW update of the preset's decoder (`--preset tiny | smol-135m`), in float32 with two threads, on the same 32
conversations: prompts as long as real clips at 12.5 Hz and a question, replies that are trained. Contestants:

    ours      packed, segments attend to themselves only
    padded    the Trainer as it is used: batches of 8 padded to their longest conversation
    packed    the Trainer's best: the 8 in one row whose mask is block-diagonal, which is checked by its logits

A token is one of a conversation: padding counts for nothing. Losses of the first two updates have to agree. A pass of the Trainer
is timed from the beginning to the end of its step, without its collator and the making of its loop. Passes alternate between the
contestants, so that what else the machine does hits all alike; a ratio is formed within each round, of the time that passed and
of the time that the process's threads computed, which other work on the machine disturbs less.
"""

import os
import statistics
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from step_kernels.bench.lengths import asterisk

from step_megatron.benchmarks.clock import Clock
from step_megatron.benchmarks.spread import spread
from step_megatron.benchmarks.train_tokens_peer import Conversation, Pass, TrainerPeer
from step_megatron.config import load_config
from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import Padding, assemble
from step_megatron.data.template import TokenizedSample
from step_megatron.runtime.device import Runtime, initialize, shutdown
from step_megatron.runtime.flops import DecoderShape, decoder_work
from step_megatron.training.batch import to_device
from step_megatron.training.loop import run_schedule, supervised_loss
from step_megatron.training.state import build_state

_CONVERSATIONS = 32
_THREADS = 2
# Spoken words make about so many text tokens a second; clips are measured in encoder frames, 50 a second, four to an audio token.
_SPOKEN, _FRAMES, _FRAMES_PER_TOKEN = 4, 50, 4
_GROUP = LossGroup("conversations")
# Losses of two float32 implementations, relative.
_AGREEING = 1e-4
OVERRIDES = (
    f"run={{device: cpu, seed: 1, threads: {_THREADS}}}",
    # No audio: the decoder alone is trained, as the peer's.
    "model.freeze=['adaptor.*']",
    "training={steps: 1000000, lr_schedule: constant}",
    "megatron.optimizer={lr: 1e-4, min_lr: 1e-4, clip_grad: 1.0, weight_decay: 0.01}",
)


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (conversations, None for 32), `preset` (of the model, None for tiny).

    Returns:
        `{"name", "preset", "ratio", "low", "high", ...}`: tokens a second of ours over the padded Trainer's (median, lowest and
        highest round), `ratio_packed` and so on over the packed one's, tokens a second of all, the losses of the first two
        updates, and the machine's load before and after.

    Raises:
        RuntimeError: a contestant's loss is not ours, or the packed row's conversations see one another.
    """
    before, load = torch.get_num_threads(), os.getloadavg()[0]
    preset = options.preset or "tiny"
    config = load_config(None, [f"model.preset={preset}", *OVERRIDES])
    conversations = make_conversations(options.clips or _CONVERSATIONS, config.model.vocabulary_size)
    runtime = initialize(config)
    try:
        ours = Ours(config, conversations, runtime)
        contestants = {"ours": ours}
        contestants |= {name: TrainerPeer(config, ours.model, conversations, packed=name == "packed") for name in _PEERS}
        losses = [{name: each.update().loss for name, each in contestants.items()} for _ in range(2)]
        _check(losses)
        rounds = [{name: each.update() for name, each in contestants.items()} for _ in range(options.repeats)]
    finally:
        shutdown()
        torch.set_num_threads(before)
    return _report(rounds, losses, ours, preset, (load, os.getloadavg()[0]))


_PEERS = ("padded", "packed")


def make_conversations(count: int, vocabulary: int) -> list[Conversation]:
    """Conversations about clips of the Asterisk prompts' lengths: a prompt, and a reply that grows with what is said."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist())

    made = []
    for frames in asterisk(count):
        question, remark = (int(torch.randint(*bounds, (1,), generator=generator)) for bounds in ((6, 16), (8, 28)))
        prompt = ids(frames // _FRAMES_PER_TOKEN + question)
        made.append(Conversation(prompt, ids(remark + _SPOKEN * frames // _FRAMES)))
    return made


class Ours:
    """Our training step over the conversations, packed once (the loader packs ahead of the step)."""

    def __init__(self, config: Config, conversations: Sequence[Conversation], runtime: Runtime):
        self.config, self.conversations, self.runtime = config, conversations, runtime
        self.state = build_state(config)
        self.model = self.state.model[0].module
        samples = [
            TokenizedSample(
                str(number),
                _GROUP.source,
                np.array(each.tokens, np.int32),
                np.array([0] * len(each.prompt) + [1] * len(each.reply), np.uint8),
                (),
            )
            for number, each in enumerate(conversations)
        ]
        self.micro_batch = assemble(samples, [_GROUP] * len(samples), lambda address: (), Padding(), 0)

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return sum(len(each.tokens) for each in self.conversations)

    def work(self) -> int:
        """Operations that an update needs."""
        lengths = [len(each.tokens) for each in self.conversations]
        trained = sum(len(each.reply) for each in self.conversations)
        return decoder_work(DecoderShape.of(self.config), lengths, trained).training()

    def update(self) -> Pass:
        """One update."""
        clock, state = Clock(), self.state
        batch = to_device(self.micro_batch, {}, (_GROUP,), self.config.encoder.width, self.runtime)
        for chunk in state.model:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        (report,) = run_schedule(state.model, [batch], supervised_loss(1))
        state.scheduler.step(1)
        state.optimizer.step()
        seconds = clock.read()
        loss, tokens = report["sums"][0].tolist()
        return Pass(loss / tokens, *seconds)


def _check(losses: Sequence[dict[str, float]]) -> None:
    for number, each in enumerate(losses, 1):
        for name in _PEERS:
            if abs(each[name] / each["ours"] - 1) > _AGREEING:
                raise RuntimeError(
                    f"the {name} Trainer computes something else: at update {number} its loss is {each[name]:.6f}, ours "
                    f"{each['ours']:.6f}"
                )


def _report(
    rounds: list[dict[str, Pass]], losses: list[dict[str, float]], ours: Ours, preset: str, load: tuple[float, float]
) -> dict:
    lengths = [len(each.tokens) for each in ours.conversations]
    print(
        f"{preset}: {len(lengths)} conversations of {min(lengths)}-{max(lengths)} tokens, {ours.tokens} in all, {_THREADS} "
        f"threads, load {load[0]:.1f}-{load[1]:.1f}; tokens a second, median of {len(rounds)} (lowest-highest)"
    )
    rates = {name: [ours.tokens / each[name].seconds for each in rounds] for name in rounds[0]}
    for name, values in rates.items():
        print(f"  {name:8} {spread(values)}")
    rate = statistics.median(rates["ours"])
    print(f"  ours computes {ours.work() / ours.tokens * rate / 1e9:.0f} GFLOP/s of what an update needs")
    result = {"name": "train-tokens", "preset": preset}
    for suffix, name in (("", "padded"), ("_packed", "packed")):
        ratios = [each[name].seconds / each["ours"].seconds for each in rounds]
        cpu = [each[name].cpu_seconds / each["ours"].cpu_seconds for each in rounds]
        print(f"  ours / {name}: {spread(ratios)}; by CPU time {spread(cpu)}")
        result |= {f"ratio{suffix}": statistics.median(ratios), f"low{suffix}": min(ratios), f"high{suffix}": max(ratios)}
        result |= {f"ratio{suffix}_cpu": statistics.median(cpu)}
    return result | {
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "losses": losses,
        "conversations": len(lengths),
        "tokens": ours.tokens,
        "threads": _THREADS,
        "load": load,
    }
