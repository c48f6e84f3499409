"""Root-mean-square norm over the last dimension.

    out = n w,   n = x r,   r = (mean(x^2) + eps)^(-1/2)
    dx  = r (g w - n mean(g n w)),   dw = sum over rows of g n

torch has one kernel for this on a GPU, which is used there; on a CPU its norm is a dozen passes over memory forward and backward.
The C++ kernel reads each row once.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467).
"""

import torch

from step_kernels import native, registry
from step_kernels.operators import operator

OP = "rms_norm"
registry.register(OP, cpp=(torch.float32,))

# kNormBlock of csrc/cpu/ops.h.
_BLOCK = 64


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Define the op in plain torch: `x` `[..., width]`, `weight` `[width]`; the result is shaped and typed as `x`."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension; arguments as in `rms_norm_reference`.

    Half precision and GPUs take torch's own norm, which computes in float32. Differentiable in `x` and `weight`, by C++ once: a
    double backward is torch's RuntimeError there.

    Raises:
        ValueError: the weight is not as wide as x, or x has no column.
    """
    if not x.dim() or not x.shape[-1] or weight.shape != x.shape[-1:]:
        raise ValueError(f"{OP}: x {tuple(x.shape)} and weight {tuple(weight.shape)}: give one weight for each column of x")
    if registry.backend(OP, x, {} if weight.dtype == torch.float32 else {"cpp": f"a weight in {weight.dtype}"}) == "cpp":
        return _op(x, weight, eps)[0]
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@operator("step::rms_norm")
def _op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and each row's factor `[rows]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, scale = torch.empty_like(rows), rows.new_empty(rows.shape[0])
    native.ops().rms_norm(rows, weight.contiguous(), eps, out, scale)
    return out.view(x.shape), scale


@_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel())


@operator("step::rms_norm_backward")
def _backward_op(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, weight_wanted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `x` and, where it is wanted, of `weight` (else an empty tensor)."""
    width = x.shape[-1]
    rows, gradients = (each.reshape(-1, width).contiguous() for each in (x, gradient))
    blocks = -(-rows.shape[0] // _BLOCK) if weight_wanted else 0
    grad_x, of_blocks = torch.empty_like(rows), rows.new_empty(blocks, width)
    native.ops().rms_norm_backward(gradients, rows, weight.contiguous(), scale, grad_x, of_blocks)
    return grad_x.view(x.shape), of_blocks.sum(0) if weight_wanted else rows.new_empty(0)


@_backward_op.register_fake
def _(gradient, x, weight, scale, weight_wanted):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_wanted else 0)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate(ctx, gradient, _):
    weight_wanted = ctx.needs_input_grad[1]
    grad_x, grad_weight = _backward_op(gradient, *ctx.saved_tensors, weight_wanted)
    return grad_x, grad_weight if weight_wanted else None, None


_op.register_autograd(_differentiate, setup_context=_save)
