"""From the loader's micro-batch to the device: audio features, unreadable clips, context-parallel slices, one copy.

Everything that depends on lengths is decided on the host, from host values, before the copy; nothing is read back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from step_kernels.segments import cumulative

from step_megatron.audio.cache import EncodedClip
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import MicroBatch, drop_failed
from step_megatron.model.batch import ModelBatch
from step_megatron.model.segments import pack_segments, zigzag_positions
from step_megatron.runtime.device import Runtime

# Parts of the one host buffer start at multiples of this many bytes, so that each can be viewed in its own type.
_ALIGNMENT = 16


@dataclass
class TrainingBatch:
    """One packed micro-batch on the device.

    Attributes:
        model: what the model reads.
        loss_mask: `[1, n]` float over the predicted tokens of this context-parallel rank: 1, or 0 where there is none to train.
        group: `[n]` int64, index of the group that each predicted token's loss is summed with.
        tokens: tokens of the whole micro-batch that are not padding.
        trained: trained tokens of the whole micro-batch.
        padding: padding tokens of the whole micro-batch.
        audio_frames: encoder frames (25 Hz) of the whole micro-batch.
        failed: addresses of the clips of the micro-batch that could not be read.
        micro_batch: what all of this was made of, on the host, without the targets of segments whose clips failed.
    """

    model: ModelBatch
    loss_mask: torch.Tensor
    group: torch.Tensor
    tokens: int
    trained: int
    padding: int
    audio_frames: int
    failed: tuple[str, ...]
    micro_batch: MicroBatch


def to_device(
    micro_batch: MicroBatch,
    clips: Mapping[str, EncodedClip | None],
    groups: Sequence[LossGroup],
    encoder_width: int,
    runtime: Runtime,
) -> TrainingBatch:
    """Build what this rank needs of a micro-batch.

    Args:
        micro_batch: from the loader; the same on every rank of a model-parallel group.
        clips: encoded clips by address. None stands for one that could not be read, agreed by all ranks of the group: its
            features are zero on the first stage, and the segment that holds it is not trained on any rank.
        groups: what losses are summed by, in order.
        encoder_width: width of the audio features.
        runtime: where this rank stands; only first-stage ranks get features.

    Raises:
        ValueError: a clip whose features have other frame counts than the plan.
    """
    failed = {span.address for span in micro_batch.audio if clips[span.address] is None}
    micro_batch = drop_failed(micro_batch, failed)
    local = local_tokens(micro_batch, runtime)
    # Where nothing is trained (a failed clip, another rank's share) one token stays, for shapes' sake, and counts for nothing.
    trained = micro_batch.loss_mask[0, local].nonzero()[:, 0]
    predicted = trained if len(trained) else torch.zeros(1, dtype=torch.int64)
    host = {
        "tokens": micro_batch.tokens,
        "labels": micro_batch.labels[:, local[predicted]],
        "loss_mask": micro_batch.loss_mask[:, local[predicted]],
        "group": group_of_tokens(micro_batch, groups)[local[predicted]],
        "predicted": predicted,
    }
    if runtime.is_first_stage and micro_batch.audio:
        host["audio_positions"] = micro_batch.audio_positions
        host["encoder_starts"] = cumulative(micro_batch.encoder_frames)
        host["features"] = gather_features(micro_batch, clips, encoder_width)
    on_device = _copy(host, runtime.device)
    return TrainingBatch(
        model=ModelBatch(
            tokens=on_device["tokens"],
            packed=pack_segments(micro_batch.segment_lengths, runtime.device, runtime.cp_size, runtime.cp_rank),
            labels=on_device["labels"],
            audio_features=on_device.get("features"),
            encoder_frames=tuple(micro_batch.encoder_frames),
            audio_positions=on_device.get("audio_positions"),
            audio_names=_audio_names(micro_batch),
            audio_tokens=tuple(span.tokens for span in micro_batch.audio),
            predicted=on_device["predicted"],
            loss_weights=on_device["loss_mask"],
            encoder_starts=on_device.get("encoder_starts"),
        ),
        loss_mask=on_device["loss_mask"],
        group=on_device["group"],
        tokens=micro_batch.tokens.shape[1] - micro_batch.padding,
        trained=int(micro_batch.loss_mask.sum()),
        padding=micro_batch.padding,
        audio_frames=sum(micro_batch.encoder_frames),
        failed=tuple(sorted(failed)),
        micro_batch=micro_batch,
    )


def local_tokens(micro_batch: MicroBatch, runtime: Runtime) -> torch.Tensor:
    """Positions in the micro-batch of this context-parallel rank's tokens, `[T_local]` int64."""
    starts = micro_batch.cu_seqlens[:-1].tolist()
    parts = [
        start + zigzag_positions(length, runtime.cp_rank, runtime.cp_size)
        for start, length in zip(starts, micro_batch.segment_lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def group_of_tokens(micro_batch: MicroBatch, groups: Sequence[LossGroup]) -> torch.Tensor:
    """Index of the group of every token, `[T]` int64."""
    index = {group: number for number, group in enumerate(groups)}
    numbers = torch.tensor([index[group] for group in micro_batch.groups])
    return numbers.repeat_interleave(torch.tensor(micro_batch.segment_lengths))


def _audio_names(micro_batch: MicroBatch) -> tuple[str, ...]:
    """What an error calls every chunk: its sample and its clip."""
    starts = micro_batch.cu_seqlens.numpy()
    segments = [int(np.searchsorted(starts, span.start, side="right")) - 1 for span in micro_batch.audio]
    return tuple(
        f"sample {micro_batch.sample_ids[segment]} (chunk {span.chunk} of {span.address})"
        for segment, span in zip(segments, micro_batch.audio, strict=True)
    )


def gather_features(micro_batch: MicroBatch, clips: Mapping[str, EncodedClip | None], width: int) -> torch.Tensor:
    """Encoder output of every chunk in the order of the placeholders, `[sum(encoder_frames), width]`; zeros where unreadable."""
    parts = []
    for span, frames in zip(micro_batch.audio, micro_batch.encoder_frames, strict=True):
        clip = clips[span.address]
        if clip is None:
            parts.append(torch.zeros(frames, width, dtype=torch.bfloat16))
            continue
        if clip.chunk_frames[span.chunk] != frames:
            raise ValueError(
                f"{span.address}: chunk {span.chunk} has {clip.chunk_frames[span.chunk]} encoder frames, the index promised "
                f"{frames}; the file has changed: run `step-megatron data validate` again"
            )
        parts.append(clip.chunk(span.chunk))
    return torch.cat(parts)


def _copy(parts: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy host tensors in one pinned buffer and one transfer that the host does not wait for."""
    if device.type == "cpu":
        return dict(parts)
    places, size = {}, 0
    for name, part in parts.items():
        places[name] = size
        size += -(-part.numel() * part.element_size() // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def view(buffer: torch.Tensor, name: str) -> torch.Tensor:
        part = parts[name]
        return buffer.narrow(0, places[name], part.numel() * part.element_size()).view(part.dtype).view(part.shape)

    for name, part in parts.items():
        view(host, name).copy_(part)
    on_device = host.to(device, non_blocking=True)
    return {name: view(on_device, name) for name in parts}
