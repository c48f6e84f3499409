"""Judging in the loop of PPO: by somebody outside while samples are still being generated, or by a model on the same devices."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from step_megatron.audio.cache import EncodedClip
from step_megatron.config.schema import JudgeConfig
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.schema import Conversation
from step_megatron.errors import UserError
from step_megatron.generation.engine import Engine
from step_megatron.generation.rendering import Rendering, prompt_of
from step_megatron.generation.request import Sampling
from step_megatron.rl.generating import generate
from step_megatron.rl.journal import Journal
from step_megatron.rl.judge.judging import Judge, Judgment, judge_pairs
from step_megatron.rl.judge.local import ModelJudge
from step_megatron.rl.judge.prompt import Pair


class Judging(Protocol):
    """What an iteration asks of a judge."""

    def start(self, pair: Pair) -> None:
        """A pair is there to be judged; this rank generated it."""
        ...

    def finish(self, pairs: Sequence[Pair], clips: Mapping[str, EncodedClip], folder: Path) -> list[Judgment]:
        """All judgments, in the pairs' order and the same on every rank, which all call this.

        Args:
            pairs: of all ranks, started or not.
            clips: of the pairs' histories.
            folder: of the iteration.
        """
        ...

    def close(self) -> None:
        """End what waits for judgments."""
        ...


class OutsideJudging:
    """By a `Judge` that needs no device of ours: every rank has judged what it generated, as it ended.

    Args:
        judge: called from threads.
        group: a gloo group of all ranks.
        overlap: whether to begin while samples are still being generated.

    Attributes:
        waited: seconds that the last `finish` waited: what was not hidden behind generation.
    """

    def __init__(self, judge: Judge, settings: JudgeConfig, seed: int, group: dist.ProcessGroup, overlap: bool = True):
        self._judge, self._settings, self._seed, self._group, self._overlap = judge, settings, seed, group, overlap
        self._pool = ThreadPoolExecutor(max(1, settings.server.concurrency), "judge")
        self._begun: dict[str, Future[list[Judgment]]] = {}
        self.waited = 0.0

    def start(self, pair: Pair) -> None:
        if self._overlap:
            self._begin(pair)

    def _begin(self, pair: Pair) -> None:
        self._begun[pair.id] = self._pool.submit(judge_pairs, [pair], self._judge, self._settings, self._seed)

    def finish(self, pairs: Sequence[Pair], clips: Mapping[str, EncodedClip], folder: Path) -> list[Judgment]:
        started = time.perf_counter()
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        begun: list[list[str]] = [[]] * ranks
        dist.all_gather_object(begun, list(self._begun), group=self._group)
        known = {name for part in begun for name in part}
        rest = [pair for pair in pairs if pair.id not in known]
        for pair in rest[rank::ranks]:
            self._begin(pair)
        parts: list[dict[str, Judgment] | UserError] = [{}] * ranks
        dist.all_gather_object(parts, self._results(), group=self._group)
        self.waited = time.perf_counter() - started
        if errors := [part for part in parts if isinstance(part, UserError)]:
            raise errors[0]
        judgments = {name: judgment for part in parts for name, judgment in part.items()}
        return [judgments[pair.id] for pair in pairs]

    def _results(self) -> dict[str, Judgment] | UserError:
        """This rank's judgments; an error that the user can mend is a value, so that all ranks learn of it."""
        begun, self._begun = self._begun, {}
        try:
            return {name: future.result()[0] for name, future in begun.items()}
        except UserError as error:
            for future in begun.values():
                future.cancel()
            return error

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class ColocatedJudging:
    """By a model on these devices, which has them when the policy has generated.

    Args:
        engine: of the judge's model.
        rendering: of its tokenizer and template.
        lengths: of the clips, for its adaptor.
        group: a gloo group of all ranks.
        writes: whether this rank writes the journal.
    """

    def __init__(
        self,
        engine: Engine,
        rendering: Rendering,
        lengths: ClipLengths,
        settings: JudgeConfig,
        seed: int,
        group: dist.ProcessGroup,
        writes: bool,
        beat: Callable[[], None] = lambda: None,
    ):
        self.engine, self._rendering, self._lengths, self._settings, self._seed = engine, rendering, lengths, settings, seed
        self._group, self._writes, self._beat = group, writes, beat

    def start(self, pair: Pair) -> None:
        """Nothing: the devices are the policy's."""

    def finish(self, pairs: Sequence[Pair], clips: Mapping[str, EncodedClip], folder: Path) -> list[Judgment]:
        with Journal(folder, "judgments", self._group, self._writes) as journal:

            def complete(prompts: Sequence[Conversation], seeds: Sequence[int]) -> list[str | None]:
                return self._complete(prompts, seeds, clips, journal)

            return judge_pairs(pairs, ModelJudge(complete), self._settings, self._seed)

    def _complete(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        clips: Mapping[str, EncodedClip],
        journal: Journal,
    ) -> list[str | None]:
        """What the judge writes after each prompt; None for one that is too long for it."""
        samples = [self._rendering.sample(conversation, self._lengths.tokens) for conversation in conversations]
        room = self.engine.longest - self._settings.max_tokens
        fits = [number for number, sample in enumerate(samples) if len(sample.input_ids) <= room]
        stop_ids, temperature, most = self._rendering.stop_ids, self._settings.temperature, self._settings.max_tokens
        samplings = [[Sampling(temperature, seed=seeds[i], max_new_tokens=most, stop_ids=stop_ids)] for i in fits]
        keys = [[f"{conversations[i].id}:{seeds[i]}"] for i in fits]
        prompts = [prompt_of(samples[i], clips) for i in fits]
        texts: list[str | None] = [None] * len(samples)
        for i, (generation,) in zip(fits, generate(self.engine, prompts, samplings, keys, journal, self._beat), strict=True):
            texts[i] = self._rendering.text(generation)
        return texts

    def close(self) -> None:
        """Nothing is held."""
