"""Bidirectional attention over packed audio segments: every frame attends to the valid frames of its own segment.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]        j over the first `valid` frames of i's segment

Differentiable in query, key and value, though the frozen encoder needs the forward pass alone.

Source: Whisper / Qwen2-Audio encoder at 50 Hz (head dimension 64); softmax in at least float32.
"""

from collections.abc import Iterator, Sequence

import torch

from step_kernels import packed_attention, packed_attention_triton, registry
from step_kernels.segments import check_packed

OP = "audio_attention_varlen"
registry.register(OP, triton=(*registry.HALF, torch.float32), flash=registry.HALF, te=registry.HALF, cpp=(torch.float32,))
_op = packed_attention.define(OP, causal=False)


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
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend within each segment.

    Args:
        query, key, value: `[frames, heads, dim]`, segments packed back to back.
        cu_seqlens: `[segments + 1]` int32 on the data's device.
        lengths: frames of each segment, on the host, so that nothing waits for the device.
        valid: leading frames of each segment that may be attended to (at least 1 unless the segment is empty); None means all.
        scale: default `dim ** -0.5`.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `[frames, heads, dim]` in `query`'s dtype; with `return_lse` also `[frames, heads]` float32 (float64 for float64).

    Raises:
        ValueError: if the lengths do not describe the packed rows, or a segment has no valid frame.
    """
    check_packed("audio_attention_varlen", query.shape[0], cu_seqlens, lengths)
    valid = lengths if valid is None else valid
    if any(not (0 < keys <= length or length == keys == 0) for length, keys in zip(lengths, valid, strict=True)):
        raise ValueError(
            f"audio_attention_varlen: each segment needs 1..length valid frames, got {tuple(valid)} of {tuple(lengths)}"
        )
    valid = () if list(valid) == list(lengths) else valid
    return packed_attention.attend(_op, OP, False, query, key, value, cu_seqlens, lengths, valid, scale, return_lse)


def aot_kernels() -> Iterator[tuple]:
    """The Triton kernels for the inspection: the encoder, 20 heads of 64, 64 clips of 30 s at 50 Hz."""
    return packed_attention_triton.aot_kernels(OP, 20, 20, 64, [1500] * 64, causal=False)
