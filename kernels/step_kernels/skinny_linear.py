"""Linear layers of few rows, as decoding has them (1 to 64 tokens), with the norm before or the residual after.

    skinny_linear       y = norm(x) W^T + b      norm: RMS, where its weight is given
    skinny_linear_add_  y += x W^T

A library's product copies the weight into an order of its own before it multiplies, which pays for hundreds of rows; at 32 rows
it is a good part of the time. The C++ kernel reads the weight once, as it lies, and keeps the rows of x in the first-level cache.
Every element is one chain of multiply-adds along the inner dimension, so its bits do not depend on how many rows there are (two
or more; a single one goes to the library). Forward only. On a GPU the library's products have kernels for this.
"""

import torch
import torch.nn.functional as F

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.rms_norm import rms_norm

OP = "skinny_linear"
registry.register(OP, cpp=(torch.float32,))
# The library's product is the faster one beyond, and of a single row (`bench skinny-linear`).
MOST_ROWS = 64
# The kernel takes inner sizes in steps of its widest vector.
_STEP = 16


def skinny_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Define the op in plain torch; arguments as in `skinny_linear`."""
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm
    return F.linear(x, weight, bias)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A linear layer, fast where `x` has few rows; any number of them is taken.

    Args:
        x: `[rows, inner]`.
        weight: `[outputs, inner]`. bias: `[outputs]`.
        norm: `[inner]`, weight of the RMS norm that `x` goes through before; None for none. eps: of that norm.

    Returns:
        `[rows, outputs]`.

    Raises:
        ValueError: sizes that do not fit.
    """
    _check(x, weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias {tuple(bias.shape)} must be [{weight.shape[0]}], one for each row of the weight")
    if _by_kernel(x):
        return _op(x, weight, bias, norm, eps)
    return F.linear(x if norm is None else rms_norm(x, norm, eps), weight, bias)


def skinny_linear_add_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Add a linear layer of `x` to `y` in place; sizes as in `skinny_linear`.

    Args:
        y: `[rows, outputs]`, contiguous.

    Returns:
        `y`.

    Raises:
        ValueError: sizes that do not fit.
    """
    _check(x, weight)
    if y.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(f"{OP}: y {tuple(y.shape)} must be [{x.shape[0]}, {weight.shape[0]}]")
    if _by_kernel(x):
        _add_op(y, x, weight)
        return y
    return y.addmm_(x, weight.t())


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"{OP}: x {tuple(x.shape)} must be [rows, inner] and weight {tuple(weight.shape)} [outputs, inner]")


def _by_kernel(x: torch.Tensor) -> bool:
    rows, inner = x.shape
    if not 1 < rows <= MOST_ROWS:
        return False
    unfit = {"cpp": f"an inner size of {inner}, no multiple of {_STEP}"} if inner % _STEP else None
    return registry.backend(OP, x, unfit) == "cpp"


@operator("step::skinny_linear")
def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    x, kernels = x.contiguous(), native.ops()
    if norm is not None:
        normed = torch.empty_like(x)
        kernels.rms_norm(x, norm, eps, normed, x.new_empty(x.shape[0]))
        x = normed
    out = x.new_empty(x.shape[0], weight.shape[0])
    kernels.skinny_linear(x, weight.contiguous(), bias, False, out)
    return out


@_op.register_fake
def _(x, weight, bias, norm, eps):
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("step::skinny_linear_add_", mutates=("y",))
def _add_op(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    native.ops().skinny_linear(x.contiguous(), weight.contiguous(), None, True, y)


@_add_op.register_fake
def _(y, x, weight):
    return None
