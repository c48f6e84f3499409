"""The packed micro-batch: samples laid back to back in one row, with everything about lengths kept on the host.

Segment `i` is `tokens[0, cu_seqlens[i]:cu_seqlens[i + 1]]`. Position `t` predicts position `t + 1` of the same segment:
`labels[0, t] = tokens[0, t + 1]`, trained where that token is a target of its sample. The last position of a segment predicts
nothing, so no segment predicts its neighbour.

Padding exists only where a communication shape needs it: each segment is filled up to a multiple of `segment_multiple`, and the
row up to a multiple of `row_multiple`, which lengthens the last segment. Padding follows a segment's tokens, so that causal
attention never sees it, and it is never a target.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from step_megatron.audio.geometry import ChunkFrames
from step_megatron.data.aspects import LossGroup
from step_megatron.data.packing import round_up
from step_megatron.data.template import AudioSpan, TokenizedSample


@dataclass(frozen=True)
class MicroBatch:
    """One packed micro-batch on the host; the same on every rank of a model-parallel group.

    Attributes:
        tokens: int64 `[1, T]`.
        labels: int64 `[1, T]`, the next token of the segment; meaningless where `loss_mask` is 0.
        loss_mask: float32 `[1, T]`, 1 where `labels` is trained.
        position_ids: int64 `[1, T]`, from 0 in each segment.
        cu_seqlens: int32 `[S + 1]`, from 0 to T.
        segment_lengths: the S differences of `cu_seqlens`, padding included.
        audio_positions: int64 `[audio tokens]`, index into T of every `<audio_patch>`, in order.
        audio: the chunks in order; `start` is an index into T.
        encoder_frames: 25 Hz frames of every chunk.
        sample_ids, groups: of each segment.
        padding: positions of the row that hold no token of a sample.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    segment_lengths: tuple[int, ...]
    audio_positions: torch.Tensor
    audio: tuple[AudioSpan, ...]
    encoder_frames: tuple[int, ...]
    sample_ids: tuple[str, ...]
    groups: tuple[LossGroup, ...]
    padding: int

    def pin_memory(self) -> "MicroBatch":
        """The same with its tensors in pinned memory, so that copies to a GPU do not wait."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True)
class Padding:
    """What communication shapes need.

    Attributes:
        segment_multiple: 2 x context-parallel size: every rank holds two pieces of each segment.
        row_multiple: what the row's length is a multiple of; a multiple of `segment_multiple`.
    """

    segment_multiple: int = 1
    row_multiple: int = 1

    @classmethod
    def for_layout(cls, tp: int, cp: int, sequence_parallel: bool, budget: int) -> "Padding":
        """Padding for a parallel layout and a budget of tokens.

        Context parallelism cuts segments in 2 x cp pieces; sequence parallelism cuts a rank's tokens in tp pieces.

        Raises:
            ValueError: the budget holds not even one unit of padding.
        """
        segment = 2 * cp if cp > 1 else 1
        row = segment * (tp if sequence_parallel else 1)
        if budget < row:
            raise ValueError(f"data.tokens_per_micro_batch is {budget}; this parallel layout needs at least {row}: raise it")
        return cls(segment, row)


def assemble(
    samples: Sequence[TokenizedSample],
    groups: Sequence[LossGroup],
    clip_frames: Callable[[str], Sequence[ChunkFrames]],
    padding: Padding,
    pad_id: int,
) -> MicroBatch:
    """Pack samples, in order, into one row.

    Args:
        groups: what each sample's losses are summed with.
        clip_frames: address -> lengths of the clip's chunks.
        pad_id: the token that fills padding; not `<audio_patch>`.

    Raises:
        ValueError: no sample.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    lengths = [round_up(len(sample.input_ids), padding.segment_multiple) for sample in samples]
    total = round_up(sum(lengths), padding.row_multiple)
    lengths[-1] += total - sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens, labels = np.full(total, pad_id, np.int64), np.full(total, pad_id, np.int64)
    loss_mask, positions = np.zeros(total, np.float32), np.empty(total, np.int64)
    audio: list[AudioSpan] = []
    for sample, start, length in zip(samples, starts[:-1].tolist(), lengths, strict=True):
        end = start + len(sample.input_ids)
        tokens[start:end] = sample.input_ids
        labels[start : end - 1] = sample.input_ids[1:]
        loss_mask[start : end - 1] = sample.loss_mask[1:]
        positions[start : start + length] = np.arange(length)
        audio += [dataclasses.replace(span, start=start + span.start) for span in sample.audio]
    audio_positions = [np.arange(span.start, span.start + span.tokens) for span in audio]
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        segment_lengths=tuple(lengths),
        audio_positions=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *audio_positions])),
        audio=tuple(audio),
        encoder_frames=tuple(clip_frames(span.address)[span.chunk].encoder for span in audio),
        sample_ids=tuple(sample.id for sample in samples),
        groups=tuple(groups),
        padding=total - sum(len(sample.input_ids) for sample in samples),
    )


def drop_failed(micro_batch: MicroBatch, failed: Collection[str]) -> MicroBatch:
    """Take the segments that use a failed clip out of the loss; their tokens and slots stay, so that every shape stays.

    A failed clip's features are the caller's to zero. A micro-batch may be left without a trained token.

    Args:
        failed: addresses of the clips, the same on every rank.
    """
    starts = np.concatenate([[0], np.cumsum(micro_batch.segment_lengths)])
    bad = sorted({int(np.searchsorted(starts, s.start, side="right")) - 1 for s in micro_batch.audio if s.address in failed})
    if not bad:
        return micro_batch
    loss_mask = micro_batch.loss_mask.clone()
    for segment in bad:
        loss_mask[:, starts[segment] : starts[segment + 1]] = 0
    return dataclasses.replace(micro_batch, loss_mask=loss_mask.pin_memory() if micro_batch.loss_mask.is_pinned() else loss_mask)
