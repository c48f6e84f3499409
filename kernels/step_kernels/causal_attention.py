"""Causal attention with grouped key-value heads over packed conversations: a token sees its own conversation's past only.

    out[i, h] = sum_{j <= i} softmax_j(scale * q[i, h] . k[j, h // group]) v[j, h // group]      j in i's segment

Differentiable in query, key and value.

Source: Qwen2.5 decoder attention (GQA); packing as in FlashAttention's varlen interface.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import registry
from step_kernels.segments import check_packed, equal_runs

OP = "causal_attention_varlen"
registry.register(OP)


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
) -> torch.Tensor:
    """Attend causally within each segment.

    Args:
        query: `[tokens, heads, dim]`, segments packed back to back.
        key, value: `[tokens, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
        cu_seqlens: `[segments + 1]` int32 on the data's device.
        lengths: tokens of each segment, on the host, so that nothing waits for the device.
        scale: default `dim ** -0.5`.

    Returns:
        `[tokens, heads, dim]` in `query`'s dtype.

    Raises:
        ValueError: if the lengths do not describe the packed rows, or the heads do not divide.
    """
    check_packed("causal_attention_varlen", query.shape[0], cu_seqlens, lengths)
    tokens, heads, dim = query.shape
    if heads % key.shape[1]:
        raise ValueError(f"causal_attention_varlen: {heads} query heads are not a multiple of {key.shape[1]} key-value heads")
    registry.backend(OP, query)
    if heads != key.shape[1]:
        key, value = (_repeat_heads(part, heads // part.shape[1]) for part in (key, value))
    runs = list(equal_runs([(length, length) for length in lengths]))
    sizes = [segments * length for segments, length, _ in runs]
    outputs = [query[:0]]
    # split and cat, not slices: the gradient of one slice is a zero tensor as long as the whole pack.
    for (segments, length, _), *qkv in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (part.unflatten(0, (segments, length)).transpose(1, 2) for part in qkv)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _repeat_heads(x: torch.Tensor, group: int) -> torch.Tensor:
    """`[tokens, kv_heads, dim]` -> `[tokens, kv_heads * group, dim]`, each head repeated `group` times in place."""
    return x.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2)
