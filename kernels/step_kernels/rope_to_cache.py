"""Rotary position embedding in generation: queries come back, keys and values go straight into the pages of the cache.

    query = rotate(q),   key_cache[slot] = rotate(k),   value_cache[slot] = v          rotate as in `rope_qk`

of the product `[q..q, k, v]` of every group, as Megatron's fused layer lays it out. In C++ one pass reads the product once.
Forward only: it serves generation.

Source: Su et al., RoFormer (arXiv:2104.09864); PagedAttention (Kwon et al. 2023) for the pages.
"""

import torch
from torch import Tensor

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.rope_qk import rope_qk_reference

OP = "rope_to_cache"
registry.register(OP, cpp=(torch.float32,))


def rope_to_cache_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
) -> Tensor:
    """Define the op in plain torch; arguments as in `rope_to_cache`."""
    query, key = rope_qk_reference(qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], cos, sin)
    for cache, new in ((key_cache, key), (value_cache, qkv[:, :, -1])):
        cache.flatten(0, 1).index_copy_(0, slots, new)
    return query


def rope_to_cache(qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
    """Rotate queries and keys, and store keys and values.

    Args:
        qkv: `[tokens, groups, queries + 2, dim]`, dim even: of each group the query heads, the key, the value.
        cos, sin: `[tokens, dim]`, of the tokens' positions, in their dtype.
        key_cache, value_cache: `[pages, page_size, groups, dim]`, contiguous; written at `slots`.
        slots: `[tokens]` int64, each a page times `page_size` plus the place in the page; none twice.

    Returns:
        The rotated queries, `[tokens, groups * queries, dim]`, a group's heads side by side.

    Raises:
        ValueError: sizes or dtypes that do not fit, or gradients are asked for.
    """
    tokens, groups, heads, dim = qkv.shape
    if key_cache.shape != value_cache.shape or key_cache.shape[2:] != (groups, dim) or heads < 3 or dim % 2:
        raise ValueError(
            f"{OP}: qkv {tuple(qkv.shape)} must be [tokens, groups, queries + 2, dim], dim even, and the caches "
            f"{tuple(key_cache.shape)} and {tuple(value_cache.shape)} [pages, page_size, groups, dim]"
        )
    if cos.shape != (tokens, dim) or sin.shape != (tokens, dim) or slots.shape != (tokens,):
        raise ValueError(f"{OP}: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, slots {tuple(slots.shape)}: one row a token")
    if not qkv.dtype == cos.dtype == sin.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(
            f"{OP}: qkv is {qkv.dtype}, cos {cos.dtype}, sin {sin.dtype}, caches {key_cache.dtype}; cast them to one"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in (qkv, cos, sin, key_cache, value_cache)):
        raise ValueError(f"{OP} is forward only: it serves generation; train by rope_qk")
    return _op(qkv, cos, sin, key_cache, value_cache, slots)


@operator("step::rope_to_cache", mutates=("key_cache", "value_cache"))
def _op(qkv: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> Tensor:
    if registry.backend(OP, qkv) == "torch":
        return rope_to_cache_reference(qkv, cos, sin, key_cache, value_cache, slots)
    tokens, groups, heads, dim = qkv.shape
    query = qkv.new_empty(tokens, groups * (heads - 2), dim)
    native.ops().rope_to_cache(
        qkv.contiguous(), cos.contiguous(), sin.contiguous(), slots.contiguous(), query, key_cache, value_cache
    )
    return query


@_op.register_fake
def _(qkv, cos, sin, key_cache, value_cache, slots):
    tokens, groups, heads, dim = qkv.shape
    return qkv.new_empty(tokens, groups * (heads - 2), dim)
