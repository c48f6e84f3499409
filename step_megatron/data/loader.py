"""The mixture loader: sources -> plan -> the packed micro-batches of one data-parallel rank, resumable to the bit.

Every rank validates the sources once, then makes the same plan from the seed and the position alone and assembles only its own
micro-batches. The plan of a step does not depend on the number of data-parallel ranks, so a run may be resumed on another number.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from step_kernels.packing import balance_evenly

from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.filters import FILTERS, first_reason
from step_megatron.data.micro_batch import MicroBatch, Padding, assemble, drop_failed
from step_megatron.data.mixture import Mixture, Source
from step_megatron.data.packing import decoder_cost, plan_window, round_up
from step_megatron.data.sources import DataError, TrainingSources
from step_megatron.data.template import TokenizedSample, render
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.data.turns import training_samples
from step_megatron.runtime.progress import get_logger

__all__ = ["DataError", "MicroBatch", "MixtureLoader", "drop_failed"]

TOO_LONG = "longer than a micro-batch"
TOO_MANY_POSITIONS = "longer than the model's positions"
NOT_TRAINED = "no trained token"
# What the samples of a position depend on, beside the sources and the tokenizer, by their names as settings.
_ORIGIN_SETTINGS = {
    "template": "tokenizer.template",
    "adaptor": "adaptor.kind",
    "train_turns": "data.train_turns",
    "earlier_reasoning": "tokenizer.earlier_reasoning",
}

_log = get_logger(__name__)


@dataclass(frozen=True)
class _Drawn:
    """A sample of the plan: where it is (source, index), the window in which it was drawn, and what it renders to."""

    source: int
    index: int
    window: int
    sample: TokenizedSample

    @property
    def place(self) -> list[int]:
        return [self.source, self.index, self.window]


class MixtureLoader:
    """Micro-batches for one data-parallel rank.

    Args:
        config: `data`, `tokenizer.template` and `earlier_reasoning`, `adaptor.kind`, `run.seed`, the parallel sizes,
            `training.micro_batches_per_step`.
        tokenizer: encodes the text.
        index: the audio index: address -> an object with `num_samples` (16 kHz); KeyError for a clip that is quarantined. None if
            no source has audio.
        dp_rank, dp_size: data-parallel position.
        pin_memory: put the tensors into pinned memory.
        validation: read `data.validation` instead of `data.sources`, `training.validation_micro_batches` to a step.
        quarantine: file for samples that are left out, with source, reason and remedy.

    Attributes:
        source_names: names of the sources, in order.
        groups: what losses are summed by; those of all samples.
        mixture: what was drawn so far (`mixture.tokens`, `mixture.epochs()`).
        sources: their samples; `sources.left_out` are those that cannot be trained on.

    Raises:
        SchemaError: a source's file has a bad line.
        DataError: too many clips are not in the index, audio without an index, or sizes that do not fit.
        ValueError: the mixture or the parallel layout is not sound.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        index: Mapping[str, Any] | None,
        dp_rank: int = 0,
        dp_size: int = 1,
        pin_memory: bool = False,
        validation: bool = False,
        quarantine: str | Path | None = None,
    ):
        # As the user knows them, for messages.
        self.sources_key = "data.validation" if validation else "data.sources"
        bins_key = "validation_micro_batches" if validation else "micro_batches_per_step"
        configured = config.data.validation if validation else config.data.sources
        self.bins_per_step = getattr(config.training, bins_key)
        if self.bins_per_step < 1 or self.bins_per_step % dp_size:
            raise DataError(f"training.{bins_key} is {self.bins_per_step}; make it a multiple of {dp_size} data-parallel ranks")
        self.tokenizer, self.dp_rank, self.dp_size = tokenizer, dp_rank, dp_size
        self.template, self.pin = config.tokenizer.template, pin_memory
        self.clips = ClipLengths(index, config.adaptor)
        self.window_size, self.seed = max(1, config.data.packing_window), config.run.seed
        self.padding = layout_padding(config)
        self.budget = config.data.tokens_per_micro_batch // self.padding.row_multiple * self.padding.row_multiple
        self.max_positions = config.model.max_positions
        self.break_even = _break_even(config.megatron.transformer)
        has_tokens = None if index is None else self.clips.has_tokens
        turns = {"train_turns": config.data.train_turns, "earlier_reasoning": config.tokenizer.earlier_reasoning}
        self.sources = TrainingSources(
            configured,
            config.data.index,
            has_tokens,
            config.data.quarantine_limit,
            samples_of=partial(training_samples, **turns),
            refused=partial(first_reason, names=_known_filters(config.data.filters)),
            quarantine=quarantine,
        )
        self.mixture = Mixture([Source(s.name, s.weight, self.sources.size(i)) for i, s in enumerate(configured)], self.seed)
        self.source_names = tuple(source.name for source in configured)
        groups = [(name, aspect) for i, name in enumerate(self.source_names) for aspect in self.sources.aspects(i)]
        self.groups = tuple(LossGroup(*group) for group in groups)
        for reason, count in Counter(self.sources.left_out.values()).items():
            _log.info("data: %d samples left out: %s", count, reason)
        self._origin = {
            "sources": [{"name": name} | self.sources.digests(i) for i, name in enumerate(self.source_names)],
            "tokenizer": tokenizer.fingerprint(),
            "template": self.template,
            "adaptor": config.adaptor.kind,
            **turns,
        }
        self._window = 0
        self._waiting: list[_Drawn] = []
        self._steps: list[list[list[_Drawn]]] = []

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, `micro_batches_per_step / dp_size` of them, each with a trained token.

        Raises:
            DataError: a source has no sample that fits.
        """
        while not self._steps:
            self._plan()
        step = self._steps.pop(0)
        costs = [decoder_cost([len(item.sample.input_ids) for item in items], self.break_even) for items in step]
        return [self._assemble(step[i]) for i in balance_evenly(costs, self.dp_size)[self.dp_rank]]

    def steps_in(self, epochs: float) -> int:
        """About how many steps there are until some source has been passed `epochs` times, so that none is heard more often.

        Every sample of an epoch is rendered, and the plan made, as training will; the position stays where it is.
        """
        start, steps, passed = self.state_dict(), 0, 0.0
        while passed < epochs:
            before, passed = passed, self._plan()
            planned, self._steps = len(self._steps), []
            steps += planned if passed <= epochs else round(planned * (epochs - before) / (passed - before))
        self.load_state_dict(start)
        return max(1, steps)

    def _assemble(self, items: list[_Drawn]) -> MicroBatch:
        groups = [LossGroup(self.source_names[item.source], item.sample.aspect) for item in items]
        batch = assemble([item.sample for item in items], groups, self.clips.frames, self.padding, self.tokenizer.pad_id)
        return batch.pin_memory() if self.pin else batch

    def _plan(self) -> float:
        """Draw a window beside the samples that wait, and plan as many whole steps as it fills.

        Returns:
            How often the source that was passed most often has been passed.
        """
        drawn = self._waiting + [self._draw() for _ in range(self.window_size)]
        lengths = [self._length(item.sample) for item in drawn]
        ages = [item.window for item in drawn]
        trained = [item.sample.trained_tokens for item in drawn]
        plan = plan_window(lengths, ages, trained, self.budget, self.bins_per_step)
        self._waiting = [drawn[i] for i in plan.waiting]
        self._steps = [[[drawn[i] for i in items] for items in step] for step in plan.steps]
        self._window += 1
        return max(self.mixture.epochs().values())

    def _draw(self) -> _Drawn:
        """The mixture's next sample that can be trained on."""
        source = self.mixture.choose()
        # The only usable sample of a source may come first in one epoch and last in the next.
        for _ in range(2 * self.mixture.sources[source].size):
            index = self.mixture.advance(source)
            sample = self._render(source, index)
            if self._fits(source, index, sample):
                self.mixture.credit(source, sample.trained_tokens)
                return _Drawn(source, index, self._window, sample)
        raise DataError(
            f"{self.sources_key}: no sample of {self.source_names[source]!r} has a trained token and at most {self.budget} "
            "tokens; raise data.tokens_per_micro_batch or remove the source"
        )

    def _render(self, source: int, index: int) -> TokenizedSample:
        return render(self.sources.conversation(source, index), self.tokenizer, self.clips.tokens, self.template)

    def _length(self, sample: TokenizedSample) -> int:
        return round_up(len(sample.input_ids), self.padding.segment_multiple)

    def _fits(self, source: int, index: int, sample: TokenizedSample) -> bool:
        """Whether a sample can be trained on; if not it is left out by name."""
        if self._length(sample) > self.budget:
            reason = f"{TOO_LONG}: {self._length(sample)} tokens, budget {self.budget}"
            remedy = "raise data.tokens_per_micro_batch or split the conversation"
            self.sources.leave_out(source, index, sample.id, reason, remedy)
        elif self._length(sample) > self.max_positions:
            reason = f"{TOO_MANY_POSITIONS}: {self._length(sample)} tokens, model.max_positions {self.max_positions}"
            self.sources.leave_out(source, index, sample.id, reason, "raise model.max_positions or split the conversation")
        elif sample.trained_tokens == 0:
            self.sources.leave_out(source, index, sample.id, NOT_TRAINED, "give it an assistant turn with train, or remove it")
        else:
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values: the mixture's, the planned steps and what waits; the same on every rank."""
        return {
            "settings": self._settings(),
            "origin": self._origin,
            "mixture": self.mixture.state_dict(),
            "window": self._window,
            "waiting": [item.place for item in self._waiting],
            "steps": [[[item.place for item in items] for items in step] for step in self._steps],
            "left_out": self.sources.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position: the following batches are those that would have followed.

        With another budget, step size or context-parallel size the samples still come in the same order, none lost or doubled,
        but what was already planned is packed anew.

        Raises:
            DataError: the seed, the sources, their samples or what these render to are others, so that there is no such position.
        """
        here = (list(self.source_names), self.seed)
        saved = ([source["name"] for source in state["origin"]["sources"]], state["settings"]["seed"])
        if saved != here:
            raise DataError(
                f"the saved position has sources {saved[0]} and seed {saved[1]}, this run has {here[0]} and {here[1]}; "
                "restore data.sources and run.seed, or start a new run from the weights"
            )
        if changed := _changes(state["origin"], self._origin):
            raise DataError(
                f"the saved position is of other data: {'; '.join(changed)}. Restore that, or start a new run from the weights"
            )
        self.mixture.load_state_dict(state["mixture"])
        self._window = state["window"]
        self._waiting = [self._restore(place) for place in state["waiting"]]
        self._steps = [[[self._restore(place) for place in items] for items in step] for step in state["steps"]]
        self.sources.load_state(state["left_out"])
        if state["settings"] != self._settings():
            # What did not fit may fit now: it is found again, or not.
            self.sources.load_state([])
            planned = [item for step in self._steps for items in step for item in items]
            self._waiting = [item for item in self._waiting + planned if self._fits(item.source, item.index, item.sample)]
            self._steps = []

    def _settings(self) -> dict[str, int]:
        """What a plan depends on beside the position."""
        return {
            "seed": self.seed,
            "budget": self.budget,
            "bins_per_step": self.bins_per_step,
            "segment_multiple": self.padding.segment_multiple,
        }

    def _restore(self, place: list[int]) -> _Drawn:
        source, index, window = place
        return _Drawn(source, index, window, self._render(source, index))


def _changes(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What a position's data, of the same sources, are otherwise than this run's, each with the likeliest cause."""
    changes = []
    for was, now in zip(saved["sources"], here["sources"], strict=True):
        if was["file"] != now["file"]:
            changes.append(f"the file of source {now['name']!r} has changed (was it built again, or edited?)")
        elif was["usable"] != now["usable"]:
            changes.append(
                f"other samples of source {now['name']!r} are usable, though its file is the same (was the audio index made "
                "again, is data.index or data.filters another?)"
            )
    if saved["tokenizer"] != here["tokenizer"]:
        changes.append("the vocabulary at tokenizer.path has changed (was `data build` run with another corpus or --vocabulary?)")
    for key, name in _ORIGIN_SETTINGS.items():
        if saved.get(key, here[key]) != here[key]:
            changes.append(f"{name} was {saved[key]}, is {here[key]}")
    return changes


def _known_filters(names: list[str]) -> list[str]:
    if unknown := set(names) - FILTERS.keys():
        raise DataError(f"data.filters: there is no filter {min(unknown)!r}; there are {', '.join(FILTERS)}")
    return names


def layout_padding(config: Config) -> Padding:
    """What the parallel layout needs, from Megatron's own settings."""
    transformer = config.megatron.transformer
    return Padding.for_layout(
        tp=transformer.get("tensor_model_parallel_size", 1),
        cp=transformer.get("context_parallel_size", 1),
        sequence_parallel=transformer.get("sequence_parallel", False),
        budget=config.data.tokens_per_micro_batch,
    )


def _break_even(transformer: Mapping[str, Any]) -> float:
    """Weights of a decoder layer over its width, see `packing.decoder_cost`: query, key, value, output, the three of SwiGLU."""
    width = transformer.get("hidden_size", 0)
    if not width:
        return float("inf")
    heads = transformer.get("num_attention_heads") or 1
    groups = transformer.get("num_query_groups") or heads
    return 2 * width + 2 * width * groups / heads + 3 * (transformer.get("ffn_hidden_size") or 4 * width)
