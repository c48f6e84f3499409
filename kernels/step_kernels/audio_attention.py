"""Bidirectional attention over packed audio segments: every frame attends to the valid frames of its own segment.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]        j over the first `valid` frames of i's segment

Forward only in use (the encoder is frozen), differentiable in torch.

Source: Whisper / Qwen2-Audio encoder at 50 Hz (head dimension 64); softmax in at least float32.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import registry
from step_kernels.segments import check_packed, equal_runs

OP = "audio_attention_varlen"
registry.register(OP)


def audio_attention_varlen_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], valid: Sequence[int], scale: float
) -> torch.Tensor:
    """Define the op in plain torch, segment by segment; arguments as in `audio_attention_varlen`."""
    outputs, start = [query[:0]], 0
    for length, keys in zip(lengths, valid, strict=True):
        q, k, v = query[start : start + length], key[start : start + keys], value[start : start + keys]
        weights = torch.softmax(scale * torch.einsum("qhd,khd->hqk", q, k), dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
        start += length
    return torch.cat(outputs)


def audio_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    valid: Sequence[int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend within each segment.

    Args:
        query, key, value: `[frames, heads, dim]`, segments packed back to back.
        cu_seqlens: `[segments + 1]` int32 on the data's device.
        lengths: frames of each segment, on the host, so that nothing waits for the device. Neighbouring segments of one length
            share a call: sort by length where the order is free.
        valid: leading frames of each segment that may be attended to (at least 1 unless the segment is empty); None means all.
        scale: default `dim ** -0.5`.

    Returns:
        `[frames, heads, dim]` in `query`'s dtype.

    Raises:
        ValueError: if the lengths do not describe the packed rows, or a segment has no valid frame.
    """
    check_packed("audio_attention_varlen", query.shape[0], cu_seqlens, lengths)
    valid = lengths if valid is None else valid
    if any(not (0 < keys <= length or length == keys == 0) for length, keys in zip(lengths, valid, strict=True)):
        raise ValueError(
            f"audio_attention_varlen: each segment needs 1..length valid frames, got {tuple(valid)} of {tuple(lengths)}"
        )
    registry.backend(OP, query)
    runs = list(equal_runs(tuple(zip(lengths, valid, strict=True))))
    sizes = [segments * length for segments, length, _ in runs]
    outputs = [query[:0]]
    for (segments, length, keys), *qkv in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (part.unflatten(0, (segments, length)).transpose(1, 2) for part in qkv)
        out = scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys], scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)
