"""Gated SiLU of a decoder's feed-forward part.

    x = [a, b]   out = s b,   s = a t,   t = 1 / (1 + e^(-a))          da = g b (t + s (1 - t)),   db = g s

In torch this is three passes over memory forward and a dozen backward (the halves' gradients are put together again); the C++
kernel makes one each. Nothing is written for a GPU, where it is plain torch unless a recipe asks for what Megatron has fused:
`megatron.transformer.bias_activation_fusion=true`, with Megatron's own feed-forward part (not run on a GPU).

Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).
"""

import torch
from torch.nn.functional import silu

from step_kernels import native, registry
from step_kernels.operators import operator

OP = "swiglu"
registry.register(OP, cpp=(torch.float32,))


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """Define the op in plain torch: `[..., 2 width]`, gates first, gives `[..., width]`."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second half of the last dimension; arguments as in `swiglu_reference`.

    Differentiable; by C++ once only: a double backward is torch's RuntimeError there.

    Raises:
        ValueError: an odd width, or no dimension.
    """
    if not x.dim() or x.shape[-1] % 2:
        raise ValueError(f"{OP}: x {tuple(x.shape)} must hold gates and values side by side, so its last size must be even")
    # Plain torch stays outside of the operator: torch differentiates its own functions, as often as wanted.
    return _op(x) if registry.backend(OP, x) == "cpp" else swiglu_reference(x)


@operator("step::swiglu")
def _op(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], rows.shape[1] // 2)
    native.ops().swiglu(rows, out)
    return out.view(*x.shape[:-1], x.shape[-1] // 2)


@_op.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@operator("step::swiglu_backward")
def _backward_op(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    native.ops().swiglu_backward(gradient.reshape(rows.shape[0], rows.shape[1] // 2).contiguous(), rows, out)
    return out.view(x.shape)


@_backward_op.register_fake
def _(gradient, x):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, gradient):
    return _backward_op(gradient, *ctx.saved_tensors)


_op.register_autograd(_differentiate, setup_context=_save)
