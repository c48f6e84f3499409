"""Judging in the loop of PPO: by somebody outside while samples are still being generated, or by a model on the same devices."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from step_megatron.audio.cache import EncodedClip
from step_megatron.config.rl import JudgeConfig
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.schema import Conversation
from step_megatron.errors import UserError
from step_megatron.generation.engine import Engine
from step_megatron.generation.rendering import Rendering, prompt_of
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.rl.generating import Stream, entry, generate
from step_megatron.rl.journal import Journal
from step_megatron.rl.judge.judging import Judge, Judgment, first_requests, judge_pairs
from step_megatron.rl.judge.local import ModelJudge
from step_megatron.rl.judge.prompt import Pair


class Judging(Protocol):
    """What an iteration asks of a judge."""

    def begin(self, clips: Mapping[str, EncodedClip], folder: Path) -> None:
        """An iteration begins; every rank calls this.

        Args:
            clips: of the prompts' histories.
            folder: of the iteration.
        """
        ...

    def alongside(self) -> AbstractContextManager[Callable[[], None]]:
        """Around generation; what it gives is called at every step of it, and may judge a little."""
        ...

    def start(self, pair: Pair) -> None:
        """A pair is there to be judged; this rank generated it."""
        ...

    def finish(self, pairs: Sequence[Pair]) -> list[Judgment]:
        """All judgments of the iteration, in the pairs' order and the same on every rank, which all call this.

        Args:
            pairs: of all ranks, started or not.
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

    def begin(self, clips: Mapping[str, EncodedClip], folder: Path) -> None:
        """Nothing: whoever answers keeps what it said."""

    def alongside(self) -> AbstractContextManager[Callable[[], None]]:
        """Nothing: threads wait for the answers."""
        return nullcontext(lambda: None)

    def start(self, pair: Pair) -> None:
        if self._overlap:
            self._ask(pair)

    def _ask(self, pair: Pair) -> None:
        self._begun[pair.id] = self._pool.submit(judge_pairs, [pair], self._judge, self._settings, self._seed)

    def finish(self, pairs: Sequence[Pair]) -> list[Judgment]:
        started = time.perf_counter()
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        begun: list[list[str]] = [[]] * ranks
        dist.all_gather_object(begun, list(self._begun), group=self._group)
        known = {name for part in begun for name in part}
        rest = [pair for pair in pairs if pair.id not in known]
        for pair in rest[rank::ranks]:
            self._ask(pair)
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
    """By a model on these devices.

    Where policy and judge are there at the same time, the two engines take turns step by step: while the last samples are being
    generated, the device's other rows judge the first.

    Args:
        engine: of the judge's model.
        rendering: of its tokenizer and template.
        lengths: of the clips, for its adaptor.
        group: a gloo group of all ranks.
        writes: whether this rank writes the journal.
        overlap: whether the judge is on the device while the policy generates.
        beat: called at every step of the engine.
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
        overlap: bool,
        beat: Callable[[], None] = lambda: None,
    ):
        self.engine, self._rendering, self._lengths, self._settings, self._seed = engine, rendering, lengths, settings, seed
        self._group, self._writes, self._overlap, self._beat = group, writes, overlap, beat
        self._clips: Mapping[str, EncodedClip] = {}
        self._journal: Journal | None = None
        self._stream: Stream | None = None

    def begin(self, clips: Mapping[str, EncodedClip], folder: Path) -> None:
        self._clips, self._journal = clips, Journal(folder, "judgments", self._group, self._writes)
        self._stream = Stream(self.engine, self._journal)

    @contextmanager
    def alongside(self) -> Iterator[Callable[[], None]]:
        with self.engine.running() if self._overlap else nullcontext():
            yield self._stream.step

    def start(self, pair: Pair) -> None:
        for request in first_requests(pair, self._settings, self._seed) if self._overlap else ():
            key, prompt, sampling = request.prompt.id, self._prompt(request.prompt), self._sampling(request.seed)
            if prompt is not None and entry(key, prompt, sampling) not in self._journal.known:
                self._stream.add(prompt, [sampling], [key], key)

    def finish(self, pairs: Sequence[Pair]) -> list[Judgment]:
        with self.engine.running():
            while not self._stream.idle:
                self._beat()
                self._stream.step()
        self._stream.share()
        try:
            return judge_pairs(pairs, ModelJudge(self._complete), self._settings, self._seed)
        finally:
            self.close()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _complete(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | None]:
        """What the judge writes after each prompt; None for one that is too long for it."""
        prompts = [self._prompt(conversation) for conversation in conversations]
        fits = [number for number, prompt in enumerate(prompts) if prompt is not None]
        samplings = [[self._sampling(seeds[i])] for i in fits]
        keys = [[conversations[i].id] for i in fits]
        made = generate(self.engine, [prompts[i] for i in fits], samplings, keys, self._journal, self._beat)
        texts: list[str | None] = [None] * len(prompts)
        for i, (generation,) in zip(fits, made, strict=True):
            texts[i] = self._rendering.text(generation)
        return texts

    def _prompt(self, conversation: Conversation) -> Prompt | None:
        sample = self._rendering.sample(conversation, self._lengths.tokens)
        fits = len(sample.input_ids) + self._settings.max_tokens <= self.engine.longest
        return prompt_of(sample, self._clips) if fits else None

    def _sampling(self, seed: int) -> Sampling:
        settings = self._settings
        return Sampling(settings.temperature, seed=seed, max_new_tokens=settings.max_tokens, stop_ids=self._rendering.stop_ids)
