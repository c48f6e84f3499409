"""Responses -> packed micro-batches of this rank, on the device, and back: which of their tokens is which.

Every rank holds the whole experience and makes the same plan, so any sample may be on any replica.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from step_kernels.packing import balance_evenly, pack_evenly

from step_megatron.audio.cache import EncodedClip
from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.loader import layout_padding
from step_megatron.data.micro_batch import MicroBatch, assemble
from step_megatron.data.packing import round_up
from step_megatron.data.template import TokenizedSample
from step_megatron.model.batch import ModelBatch
from step_megatron.rl.rollout import Experience
from step_megatron.runtime.device import Runtime
from step_megatron.training.batch import local_tokens, to_device

_GROUP = LossGroup("rl")


@dataclass
class ResponseBatch:
    """One packed micro-batch on the device.

    Attributes:
        model: what the model reads; it gives `TokenScores` of the `n` predicted tokens.
        place: `[n]` int64 on the host, of every predicted token among the experience's tokens.
        counts: `[n]` bool on the device; False for tokens that stand there for the shape's sake, and for samples that are not
            trained on.
    """

    model: ModelBatch
    place: torch.Tensor
    counts: torch.Tensor

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Of `[tokens]` on the host, those of the predicted tokens, `[n]` on the device."""
        return values[self.place].to(self.counts.device, non_blocking=True)


class ResponseBatcher:
    """Plans and builds micro-batches.

    Args:
        config: `data.tokens_per_micro_batch`, the parallel sizes, sizes of the model, `rl.rollout.temperature`.
        pad_id: the token that fills padding.
        lengths: of the clips.
        runtime: where this rank stands.

    Raises:
        ConfigError: a temperature at which there is no policy.
    """

    def __init__(self, config: Config, pad_id: int, lengths: ClipLengths, runtime: Runtime):
        self._config, self._pad_id, self._lengths, self._runtime = config, pad_id, lengths, runtime
        self._temperature = config.rl.rollout.temperature
        if self._temperature <= 0:
            raise ConfigError(f"rl.rollout.temperature={self._temperature:g}: PPO samples from its policy; give one above 0")
        self._padding = layout_padding(config)
        self.budget = config.data.tokens_per_micro_batch // self._padding.row_multiple * self._padding.row_multiple

    def batches(
        self,
        experience: Experience,
        chosen: Sequence[int],
        clips: Mapping[str, EncodedClip | None],
        with_entropy: bool = False,
    ) -> list[ResponseBatch]:
        """This replica's micro-batches of some of the samples; every replica gets the same number.

        Args:
            chosen: indices of the samples, at least one, each with a token of its own.
            clips: encoded clips by address.
        """
        samples = [experience.samples[index] for index in chosen]
        bins = self._plan(samples)
        costs = [sum(len(samples[i].input_ids) for i in items) for items, _ in bins]
        mine = balance_evenly(costs, self._runtime.dp_size)[self._runtime.dp_rank]
        return [
            self._build(experience, [chosen[i] for i in bins[number][0]], bins[number][1], clips, with_entropy) for number in mine
        ]

    def _plan(self, samples: Sequence[TokenizedSample]) -> list[tuple[list[int], bool]]:
        """Bins of samples, a multiple of what all replicas (and an interleaved schedule) need; and whether each counts."""
        lengths = [round_up(len(sample.input_ids), self._padding.segment_multiple) for sample in samples]
        bins = pack_evenly(lengths, [sample.trained_tokens for sample in samples], self.budget)
        interleaved = self._config.megatron.transformer.get("virtual_pipeline_model_parallel_size")
        multiple = self._runtime.dp_size * (self._runtime.pp_size if interleaved else 1)
        while len(bins) % multiple and max(map(len, bins)) > 1:
            largest = max(bins, key=len)
            bins.remove(largest)
            bins += [largest[::2], largest[1::2]]
        # Fewer samples than replicas: some replica computes one that another trains on.
        idle = -len(bins) % multiple
        return [(items, True) for items in bins] + [(bins[0], False)] * idle

    def _build(
        self,
        experience: Experience,
        items: list[int],
        counts: bool,
        clips: Mapping[str, EncodedClip | None],
        with_entropy: bool,
    ) -> ResponseBatch:
        samples = [experience.samples[index] for index in items]
        micro_batch = assemble(samples, [_GROUP] * len(samples), self._lengths.frames, self._padding, self._pad_id)
        batch = to_device(micro_batch, clips, [_GROUP], self._config.encoder.width, self._runtime)
        place, real = self._places(micro_batch, experience, items)
        valid = experience.mask[place] & real & counts
        model = dataclasses.replace(batch.model, loss_weights=None, temperature=self._temperature, with_entropy=with_entropy)
        return ResponseBatch(model, place, valid.to(self._runtime.device))

    def _places(self, micro_batch: MicroBatch, experience: Experience, items: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of every predicted token of this context-parallel rank among the experience's tokens, and whether it is one."""
        starts = experience.cu_seqlens.tolist()
        whole = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in items])
        trained = micro_batch.loss_mask[0] > 0
        local = local_tokens(micro_batch, self._runtime)
        ordinal = trained.long().cumsum(0)[local][trained[local]] - 1
        if len(ordinal):
            return whole[ordinal], torch.ones(len(ordinal), dtype=torch.bool)
        # One token stays where this rank has none to predict (`to_device`).
        return whole[:1], torch.zeros(1, dtype=torch.bool)
