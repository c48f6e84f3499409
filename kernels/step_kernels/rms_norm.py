"""Root-mean-square norm over the last dimension.

    out = n w,   n = x r,   r = (mean(x^2) + eps)^(-1/2)
    dx  = r (g w - n mean(g n w)),   dw = sum over rows of g n

torch has one kernel for this on a GPU, which is used there; on a CPU its norm is a dozen passes over memory forward and backward.
The C++ kernel reads each row once; `torch` is the same without it, in few passes.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv:1910.07467).
"""

import torch
from torch.autograd.function import once_differentiable

from step_kernels import native, registry

OP = "rms_norm"
registry.register(OP, cpp=(torch.float32,))

# kNormBlock of csrc/cpu/ops.h.
_BLOCK = 64


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Define the op in plain torch: `x` `[..., width]`, `weight` `[width]`; the result is shaped and typed as `x`."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension; arguments as in `rms_norm_reference`. Differentiable once in `x` and `weight`.

    Half precision and GPUs take torch's own norm, which computes in float32.

    Raises:
        ValueError: the weight is not as wide as x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{OP}: x {tuple(x.shape)} and weight {tuple(weight.shape)}: give one weight for each column of x")
    if registry.backend(OP, x, unfit=() if weight.dtype == torch.float32 else ("cpp",)) == "cpp":
        return _op(x, weight, eps)[0]
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        return _RMSNorm.apply(x, weight, eps)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@torch.library.custom_op("step::rms_norm", mutates_args=())
def _op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and each row's factor `[rows]`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out, scale = torch.empty_like(rows), rows.new_empty(rows.shape[0])
    native.ops().rms_norm(rows, weight.contiguous(), eps, out, scale)
    return out.view(x.shape), scale


@_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel())


@torch.library.custom_op("step::rms_norm_backward", mutates_args=())
def _backward_op(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    rows, gradients = (each.reshape(-1, width).contiguous() for each in (x, gradient))
    grad_x, of_blocks = torch.empty_like(rows), rows.new_empty(-(-rows.shape[0] // _BLOCK), width)
    native.ops().rms_norm_backward(gradients, rows, weight.contiguous(), scale, grad_x, of_blocks)
    return grad_x.view(x.shape), of_blocks.sum(0)


@_backward_op.register_fake
def _(gradient, x, weight, scale):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


def _differentiate(ctx, gradient, _):
    return *_backward_op(gradient, *ctx.saved_tensors), None


_op.register_autograd(_differentiate, setup_context=_save)


class _RMSNorm(torch.autograd.Function):
    """The same in plain torch, in fewer passes than torch's own on a CPU."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        normal = rows * scale
        ctx.save_for_backward(normal, scale, weight)
        return (normal * weight).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normal, scale, weight = ctx.saved_tensors
        rows = gradient.reshape(normal.shape)
        product = rows * normal
        # The mean over a row of g n w is a matrix-vector product: no pass of its own.
        mean = torch.mv(product, weight).div_(-normal.shape[-1]).unsqueeze(-1)
        return (rows * weight).addcmul_(normal, mean).mul_(scale).view(gradient.shape), product.sum(0), None
