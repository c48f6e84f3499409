"""Causal attention with grouped key-value heads over packed conversations: a token sees its own conversation's past only.

    out[i, h] = sum_{j <= i} softmax_j(scale * q[i, h] . k[j, h // group]) v[j, h // group]      j in i's segment

Differentiable in query, key and value.

Source: Qwen2.5 decoder attention (GQA); packing as in FlashAttention's varlen interface.
"""

from collections.abc import Iterator, Sequence

import torch

from step_kernels import packed_attention, packed_attention_triton, registry
from step_kernels.segments import check_packed

OP = "causal_attention_varlen"
registry.register(OP, triton=(*registry.HALF, torch.float32), flash=registry.HALF, te=registry.HALF, cpp=(torch.float32,))
_op = packed_attention.define(OP, causal=True)


def causal_attention_varlen_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int], scale: float
) -> torch.Tensor:
    """Define the op in plain torch, segment by segment; arguments as in `causal_attention_varlen`."""
    group = query.shape[1] // key.shape[1]
    outputs, start = [query[:0]], 0
    for length in lengths:
        q, k, v = (part[start : start + length] for part in (query, key, value))
        scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, dim=1))
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, dim=1)))
        start += length
    return torch.cat(outputs)


def causal_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend causally within each segment.

    Args:
        query: `[tokens, heads, dim]`, segments packed back to back.
        key, value: `[tokens, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
        cu_seqlens: `[segments + 1]` int32 on the data's device.
        lengths: tokens of each segment, on the host, so that nothing waits for the device.
        scale: default `dim ** -0.5`.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `[tokens, heads, dim]` in `query`'s dtype; with `return_lse` also `[tokens, heads]` float32 (float64 for float64).

    Raises:
        ValueError: if the lengths do not describe the packed rows, or the heads do not divide.
    """
    check_packed("causal_attention_varlen", query.shape[0], cu_seqlens, lengths)
    heads = query.shape[1]
    if heads % key.shape[1]:
        raise ValueError(f"causal_attention_varlen: {heads} query heads are not a multiple of {key.shape[1]} key-value heads")
    return packed_attention.attend(_op, OP, True, query, key, value, cu_seqlens, lengths, (), scale, return_lse)


def aot_kernels() -> Iterator[tuple]:
    """The Triton kernels for the inspection: the 32B decoder, 40 heads of 128 on 8 key-value heads, 4 x 4,096 tokens."""
    return packed_attention_triton.aot_kernels(OP, 40, 8, 128, [4096] * 4, causal=True)
