"""Rotary position embedding of queries and keys, both at once.

    out = x cos + rotate_half(x) sin,   rotate_half([a, b]) = [-b, a]          the gradient is the same with the matrix transposed

In torch this is five passes over memory forward and more backward; the C++ kernel makes one each. On a GPU it is plain torch: by
count, a fused kernel would save about a hundredth of a step at 32B (kernels/benchmarks/README.md).

Source: Su et al., RoFormer (arXiv:2104.09864), in the half-rotated layout of GPT-NeoX, LLaMA and Qwen2.
"""

import torch

from step_kernels import native, registry
from step_kernels.operators import operator

OP = "rope_qk"
registry.register(OP, cpp=(torch.float32,))


def rope_qk_reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the op in plain torch; arguments as in `rope_qk`."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)

    return rotated(query), rotated(key)


def rope_qk(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their tokens' cosines and sines; differentiable in query and key.

    Args:
        query, key: `[tokens, heads, dim]`, dim even; the heads of the two may differ in number.
        cos, sin: `[tokens, dim]`, in their dtype.

    Returns:
        New tensors, shaped as query and key.

    Raises:
        ValueError: sizes that do not fit, or dtypes that differ.
    """
    shape = (query.shape[0], query.shape[-1]) if query.dim() == 3 else ()
    if not shape or key.dim() != 3 or (key.shape[0], key.shape[2]) != shape or shape[1] % 2:
        raise ValueError(
            f"{OP}: query {tuple(query.shape)} and key {tuple(key.shape)} must be [tokens, heads, dim] of the same tokens and "
            "the same even dim"
        )
    if cos.shape != shape or sin.shape != shape:
        raise ValueError(f"{OP}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be {shape}, one row a token")
    if not query.dtype == key.dtype == cos.dtype == sin.dtype:
        dtypes = ", ".join(f"{name} {each.dtype}" for name, each in (("key", key), ("cos", cos), ("sin", sin)))
        raise ValueError(f"{OP}: query is {query.dtype}, but {dtypes}; cast them to one")
    # Plain torch stays outside of the operator: torch differentiates its own functions, as often as wanted.
    if registry.backend(OP, query) == "cpp":
        return _op(query, key, cos, sin, False)
    return rope_qk_reference(query, key, cos, sin)


@operator("step::rope_qk")
def _op(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    results = []
    for x in (query, key):
        results.append(x.new_empty(x.shape))
        native.ops().rope(x if x.stride(2) == 1 else x.contiguous(), cos, sin, inverse, results[-1])
    return tuple(results)


@_op.register_fake
def _(query, key, cos, sin, inverse):
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx, inputs, output):
    *_, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, grad_query, grad_key):
    return *_op(grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


_op.register_autograd(_differentiate, setup_context=_save)
