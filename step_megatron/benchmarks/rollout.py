"""Tokens a second of rollouts from prompts of unequal length, beside transformers with the same weights.

Prompts are text of 20 to 120 tokens, in float32. Three cases:

    greedy      each prompt is continued by 64 tokens
    sampling    the same, from the untruncated distribution at temperature 1
    spread      greedy; replies end at lengths of their own, as a real policy's do, and what goes on beyond an end does not count

Contestants: ours; ours with `generation.batch_invariant`, which says what equal bits cost (in the greedy case); transformers'
`generate`, padded on the left, all prompts in one batch, which goes on until the longest reply has ended, so that the longest
length over the mean one is what a static batch loses; and its continuous-batching `generate_batch` (in the greedy case), in a
process of its own and with a cache that fits the prompts, or the reason why it gave no result. Runs alternate between the
contestants, so that what else the machine does hits all of them alike; a ratio is formed within each round, of each contestant's
second run where runs are short.
"""

import os
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from step_megatron.benchmarks import rollout_peer
from step_megatron.benchmarks.clock import Clock
from step_megatron.benchmarks.rollout_peer import ContinuousBatching, Work
from step_megatron.benchmarks.spread import spread
from step_megatron.benchmarks.train_step import OVERRIDES
from step_megatron.config import load_config
from step_megatron.conversion.live import write_decoder
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.model.audio_lm import build_model
from step_megatron.runtime.device import initialize, shutdown

_PROMPTS, _NEW_TOKENS, _LONGEST = 32, 64, 160
# Sums in another order may turn a near tie: from there on a row goes its own way.
_AGREEING = 0.9
# A run that takes longer is not repeated for warm caches.
_LONG_SECONDS = 5.0
_OURS, _PEER, _BATCHING = "ours", "transformers generate", "transformers generate_batch"


def run(options: Namespace) -> dict:
    """Measure, print a table for every case, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (prompts, None for 32), `preset` (None for tiny).

    Returns:
        `{"name", "preset", "ratio", "low", "high", "limit", "share_of_limit", "cases", "absent", ...}`: `ratio` is tokens a
        second over `generate`'s where replies end at lengths of their own (median, lowest and highest round), `limit` what a
        static batch loses there; `cases` holds, of every case, tokens a second of each contestant, and ours over each other
        (`cpu`: by CPU time); `absent` says why `generate_batch` is not among them, if it is not; `load` is the machine's before
        and after.

    Raises:
        RuntimeError: another contestant generates other greedy tokens (then the comparison is worth nothing).
    """
    prompts, load = _prompts(options.clips or _PROMPTS), os.getloadavg()[0]
    preset = options.preset or "tiny"
    config = load_config(None, [*OVERRIDES, f"model.preset={preset}"])
    initialize(config)
    with ExitStack() as cleaning:
        cleaning.callback(shutdown)
        folder = Path(cleaning.enter_context(tempfile.TemporaryDirectory()))
        (model,) = build_model(config)
        write_decoder(folder, model, config)
        cases = _Cases(prompts, lambda **settings: Engine(model, replace(config.generation, **settings)), folder)
        absent = cases.try_batching(cleaning)
        measured = {
            "greedy": _measure("greedy", cases.greedy(), None, options.repeats),
            "sampling": _measure("sampling", cases.sampling(), None, options.repeats),
            "spread": _measure("spread", cases.spread(), _lengths(len(prompts)), options.repeats),
        }
    lengths = _lengths(len(prompts))
    over = measured["spread"]["ours_over"][_PEER]
    limit = max(lengths) / statistics.mean(lengths)
    print(f"spread: longest reply over mean {limit:.2f}; reached {over['median'] / limit:.0%} of it")
    return {
        "name": "rollout",
        "preset": preset,
        "ratio": over["median"],
        "low": over["low"],
        "high": over["high"],
        "limit": limit,
        "share_of_limit": over["median"] / limit,
        "cases": measured,
        "absent": absent,
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
        "load": (load, os.getloadavg()[0]),
    }


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 121, (count,), generator=generator).tolist()
    return [torch.randint(2, 4096, (length,), generator=generator).tolist() for length in lengths]


def _lengths(count: int) -> list[int]:
    """Lengths of replies: log-normal, half of them below 40."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return [min(int(length), _LONGEST) for length in (3.7 + 0.8 * normal).exp().clamp(min=4).tolist()]


class _Cases:
    """The contestants of every case.

    Args:
        prompts: token ids.
        engine: makes one of ours, with settings of `generation`.
        folder: of the peers' weights, which are ours.
    """

    def __init__(self, prompts: Sequence[list[int]], engine: Callable[..., Engine], folder: Path):
        self.prompts, self._engine, self._folder = prompts, engine, folder
        self._peer = rollout_peer.load(folder)
        self._batching: dict[str, Work] = {}

    def try_batching(self, cleaning: ExitStack) -> dict[str, str]:
        """Ask continuous batching once: it takes part if it answers; else why it does not."""
        work = ContinuousBatching(self._folder, self.prompts, _NEW_TOKENS)
        cleaning.callback(work.close)
        try:
            work()
        except (TimeoutError, RuntimeError) as error:
            print(f"{_BATCHING}: {error}")
            return {_BATCHING: str(error)}
        self._batching = {_BATCHING: work}
        return {}

    def greedy(self) -> dict[str, Work]:
        """Replies of equal length, and what equal bits cost."""
        lengths = [_NEW_TOKENS] * len(self.prompts)
        return {
            _OURS: self._ours(lengths),
            "batch invariant": self._ours(lengths, batch_invariant=True),
            _PEER: rollout_peer.generate(self._peer, self.prompts, _NEW_TOKENS),
            **self._batching,
        }

    def sampling(self) -> dict[str, Work]:
        """Replies of equal length, sampled."""
        peer = rollout_peer.generate(self._peer, self.prompts, _NEW_TOKENS, sample=True)
        return {_OURS: self._ours([_NEW_TOKENS] * len(self.prompts), 1.0), _PEER: peer}

    def spread(self) -> dict[str, Work]:
        """Replies that end at `_lengths`."""
        lengths = _lengths(len(self.prompts))
        return {_OURS: self._ours(lengths), _PEER: rollout_peer.generate(self._peer, self.prompts, max(lengths))}

    def _ours(self, lengths: list[int], temperature: float = 0.0, **settings) -> Work:
        engine = self._engine(**settings)
        samplings = [Sampling(temperature, seed=i, max_new_tokens=length) for i, length in enumerate(lengths)]
        return lambda: [each.tokens for each in engine.generate([Prompt(tokens) for tokens in self.prompts], samplings)]


def _measure(case: str, contestants: dict[str, Work], lengths: list[int] | None, repeats: int) -> dict:
    results = {name: work() for name, work in contestants.items()}
    counted = sum(map(len, results[_OURS]))
    agreeing = None if case == "sampling" else _agreement(results, lengths)
    rounds = [{name: _timed(work) for name, work in contestants.items()} for _ in range(repeats)]
    print(f"{case}: {counted} new tokens, {torch.get_num_threads()} threads; tokens a second, median (lowest-highest)")
    for name in contestants:
        print(f"  {name:27} {spread([counted / each[name][0] for each in rounds])}")
    over = {}
    for other in contestants:
        if other != _OURS:
            ratios = [each[other][0] / each[_OURS][0] for each in rounds]
            over[other] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            told = spread(ratios)
            # The time of another process is not seen here.
            if other != _BATCHING:
                cpu = [each[other][1] / each[_OURS][1] for each in rounds]
                over[other]["cpu"] = statistics.median(cpu)
                told += f"; by CPU time {spread(cpu)}"
            print(f"  ours / {other}: {told}")
    rates = {name: statistics.median(counted / each[name][0] for each in rounds) for name in contestants}
    return {"tokens": counted, "agreeing": agreeing, "tokens_per_second": rates, "ours_over": over}


def _agreement(results: dict[str, list[list[int]]], lengths: list[int] | None = None) -> float:
    """Share of the tokens that are ours, of the contestant that has fewest; what goes on beyond a reply's end does not count."""
    ours = results[_OURS]
    lengths = lengths or [len(reply) for reply in ours]
    if [len(reply) for reply in ours] != lengths:
        raise RuntimeError("our replies do not end where they should")
    shares = {
        name: sum(a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=False))
        / sum(lengths)
        for name, theirs in results.items()
    }
    name = min(shares, key=shares.__getitem__)
    if shares[name] < _AGREEING:
        raise RuntimeError(f"{name} generates something else: {shares[name]:.0%} of its tokens are ours")
    return shares[name]


def _timed(work: Work) -> tuple[float, float]:
    """Seconds, and seconds of all threads; of the second of two runs, where a run is short.

    The first finds caches full of the contestant before, or memory that the system took back while another process worked.
    """
    for _ in range(2):
        clock = Clock()
        work()
        seconds = clock.read()
        if seconds[0] > _LONG_SECONDS:
            break
    return seconds
