"""Packed micro-batches with audio, made from a seed: the loader's and the encoder's output without files."""

from dataclasses import replace

import torch

from step_megatron.audio.cache import EncodedClip
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import MicroBatch
from step_megatron.data.template import AudioSpan

ENCODER_WIDTH = 24
VOCABULARY = 128
GROUPS = (LossGroup("speech", "continuity"), LossGroup("text"))


def audio_tokens(frames: int) -> int:
    return (frames - 1) // 2 + 1


def segment(
    length: int, frames: tuple[int, ...], trained: int, seed: int, name: str
) -> tuple[MicroBatch, dict[str, EncodedClip]]:
    """One conversation of `length` tokens with a clip of one chunk per entry of `frames`; its last `trained` are trained."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, length)
    mask[:, length - trained :] = 1
    spans, clips, start = [], {}, 1
    for number, count in enumerate(frames):
        address = f"{name}.{number}.wav"
        spans.append(AudioSpan(address, 0, start, audio_tokens(count)))
        clips[address] = EncodedClip(torch.randn(count, ENCODER_WIDTH, generator=generator).bfloat16(), (count,))
        start += audio_tokens(count) + 1
    assert start <= length - trained, "the clips do not fit"
    made = MicroBatch(
        tokens=torch.randint(0, VOCABULARY, (1, length), generator=generator),
        labels=torch.randint(0, VOCABULARY, (1, length), generator=generator),
        loss_mask=mask,
        position_ids=torch.arange(length)[None],
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
        segment_lengths=(length,),
        audio_positions=torch.tensor([p for s in spans for p in range(s.start, s.start + s.tokens)], dtype=torch.int64),
        audio=tuple(spans),
        encoder_frames=frames,
        sample_ids=(name,),
        groups=(GROUPS[0] if frames else GROUPS[1],),
        padding=0,
    )
    return made, clips


def pack(segments: list[MicroBatch]) -> MicroBatch:
    """Segments back to back in one micro-batch."""
    lengths = [s.segment_lengths[0] for s in segments]
    starts = [sum(lengths[:i]) for i in range(len(segments) + 1)]
    places = list(zip(segments, starts, strict=False))
    return MicroBatch(
        tokens=torch.cat([s.tokens for s in segments], 1),
        labels=torch.cat([s.labels for s in segments], 1),
        loss_mask=torch.cat([s.loss_mask for s in segments], 1),
        position_ids=torch.cat([s.position_ids for s in segments], 1),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        segment_lengths=tuple(lengths),
        audio_positions=torch.cat([s.audio_positions + start for s, start in places]),
        audio=tuple(replace(span, start=span.start + start) for s, start in places for span in s.audio),
        encoder_frames=tuple(count for s in segments for count in s.encoder_frames),
        sample_ids=tuple(name for s in segments for name in s.sample_ids),
        groups=tuple(group for s in segments for group in s.groups),
        padding=0,
    )


# (tokens, encoder frames of its clips, trained tokens); micro-batches of very different trained counts, one of text only.
STEP = (
    ((32, (23,), 8), (16, (), 6), (24, (9, 6), 5)),
    ((16, (7,), 3),),
    ((48, (31, 10), 20), (8, (), 2)),
    ((24, (), 12), (16, (), 9)),
)


def step_segments(step: int) -> tuple[list[list[MicroBatch]], dict[str, EncodedClip]]:
    """The segments of one training step by micro-batch, and the clips in them."""
    clips: dict[str, EncodedClip] = {}
    groups = []
    for number, shapes in enumerate(STEP):
        group = []
        for place, (length, frames, trained) in enumerate(shapes):
            made, found = segment(length, frames, trained, 1000 * step + 10 * number + place, f"{step}-{number}-{place}")
            group.append(made)
            clips |= found
        groups.append(group)
    return groups, clips
