"""Strided convolution and GELU over packed audio segments: the adaptor's 25 Hz -> 12.5 Hz step.

    out[o] = GELU(bias + weight[:, :, 0] x[2 o - 1] + weight[:, :, 1] x[2 o] + weight[:, :, 2] x[2 o + 1])

for `o` in `0 .. (length - 1) // 2` of each segment: Conv1d(kernel 3, stride 2, padding 1) per segment. A frame outside the
segment reads zero, whatever lies next door in the pack; an empty segment gives nothing. All three inputs get gradients.

The three frames of every output side by side (im2col) would take 1.5 times the input's memory, and be kept for backward: here
they exist for a block of outputs at a time (C++, see conv_products.py) or not at all (Triton, whose products read rows of x by
their numbers). What is kept for backward is x and the values before GELU.

Source: Step-Audio 2 adaptor (`conv`, then GELU); GELU is the exact one (erf).
"""

import torch
from torch.nn.functional import conv1d, gelu, linear, pad

from step_kernels import conv_products, native, registry
from step_kernels.gathered_matmul import gathered_matmul, gathered_weight_gradient
from step_kernels.operators import operator
from step_kernels.segments import check_counts

OP = "conv_downsample_gelu"
registry.register(OP, triton=registry.HALF, cpp=(torch.float32,))

# Outputs whose gradients go back to their frames at once.
_SCATTER_ROWS = 2048


def conv_downsample_gelu_reference(
    x: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Define the op in plain torch; every backend is tested against this, in float64.

    Args:
        x: `[frames, in_width]`, segments packed back to back.
        cu_seqlens: `[segments + 1]` int32, `cu_seqlens[0] == 0`, non-decreasing, last = frames.
        weight: `[out_width, in_width, 3]`, as `torch.nn.Conv1d` holds it.
        bias: `[out_width]`.

    Returns:
        `[sum((length + 1) // 2), out_width]` in `x`'s dtype.
    """
    outputs = [
        gelu(conv1d(x[start:end].t()[None], weight, bias, stride=2, padding=1))[0].t()
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        if end > start
    ]
    return torch.cat([x.new_empty(0, weight.shape[0]), *outputs])


def conv_downsample_gelu(
    x: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: int
) -> torch.Tensor:
    """Convolve packed segments with stride two; arguments as in `conv_downsample_gelu_reference`.

    Args:
        x: also in bfloat16 where the weight is float32, as the cache of encoded audio holds it; the result is then float32.
        rows: number of output rows, `sum((length + 1) // 2)`, known to the packer, so that the host never waits for the device.

    Raises:
        ValueError: shapes or types that do not fit; or bounds in CPU memory that do not fit `x` or `rows` (on a device nobody
            looks).
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[1:] != (x.shape[1], 3) or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be [frames, in], "
            "[out, in, 3] and [out]"
        )
    if bias.dtype != weight.dtype:
        raise ValueError(f"{OP}: weight in {weight.dtype} and bias in {bias.dtype} must be of one type")
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return _op(x, cu_seqlens, weight, bias, rows, trained)[0]


@operator("step::conv_downsample_gelu")
def _op(
    x: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows: int, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and, if backward will want them (`keep`), the values before GELU."""
    check_counts(OP, len(x), cu_seqlens, rows=(rows, lambda lengths: (lengths + 1) // 2))
    x, weight, bias, chosen = _prepare(x, weight, bias)
    out = weight.new_empty(rows, weight.shape[0])
    before = torch.empty_like(out) if keep else out
    if chosen == "cpp":
        conv_products.convolve(conv_products.stored(x, cu_seqlens, rows), weight, bias, before, out)
    elif chosen == "triton":
        taps = (downsample_taps(cu_seqlens, rows) - 1).int()
        gathered_matmul(x, taps, weight.permute(2, 1, 0).contiguous(), out, bias, before if keep else None)
    else:
        in_torch(x, cu_seqlens, weight, bias, before, out)
    return out, before if keep else out.new_empty(0)


@_op.register_fake
def _(x, cu_seqlens, weight, bias, rows, keep):
    out = weight.new_empty(rows, weight.shape[0])
    return out, torch.empty_like(out) if keep else out.new_empty(0)


@operator("step::conv_downsample_gelu_backward")
def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weight: torch.Tensor,
    before: torch.Tensor,
    x_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias from the result's and what forward kept; of those not wanted, tensors without elements."""
    frames, dtype, rows = x.shape[0], x.dtype, len(gradient)
    x, weight, gradient, chosen = _prepare(x, weight, gradient)
    if chosen == "cpp":
        hidden, grad_bias = torch.empty_like(gradient), gradient.new_empty(len(weight))
        native.ops().gelu_gradient(gradient, before, hidden, grad_bias)
    else:
        hidden = torch.ops.aten.gelu_backward(gradient, before)
        grad_bias = hidden.sum(0)
    grad_x = weight.new_zeros(x.shape if x_wanted else 0)
    grad_weight = weight.new_empty(weight.shape if weight_wanted else 0)
    if chosen == "triton":
        if x_wanted:
            gathered_matmul(hidden, upsample_taps(cu_seqlens, frames), weight.permute(2, 0, 1).contiguous(), grad_x)
        if weight_wanted:
            gathered_weight_gradient(hidden, x, (downsample_taps(cu_seqlens, rows) - 1).int(), grad_weight)
    else:
        _add_gradients(chosen, hidden, x, cu_seqlens, weight, grad_x, grad_weight)
    return grad_x.to(dtype), grad_weight, grad_bias


@backward.register_fake
def _(gradient, x, cu_seqlens, weight, before, x_wanted, weight_wanted):
    return (
        x.new_empty(x.shape if x_wanted else 0),
        weight.new_empty(weight.shape if weight_wanted else 0),
        weight.new_empty(weight.shape[0]),
    )


def _save(ctx, inputs, output):
    x, cu_seqlens, weight, *_ = inputs
    ctx.save_for_backward(x, cu_seqlens, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, _):
    x_wanted, _, weight_wanted, bias_wanted = ctx.needs_input_grad[:4]
    if gradient is None:
        return (None,) * 6
    grad_x, grad_weight, grad_bias = backward(gradient, *ctx.saved_tensors, x_wanted, weight_wanted)
    return (
        grad_x if x_wanted else None,
        None,
        grad_weight if weight_wanted else None,
        grad_bias if bias_wanted else None,
        None,
        None,
    )


_op.register_autograd(_differentiate, setup_context=_save)


def _prepare(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ..., str]:
    """The inputs as the backend takes them, and the backend, which the weight's type decides."""
    chosen = registry.backend(OP, weight)
    if not (chosen == "cpp" and x.dtype == torch.bfloat16):
        x = x.to(weight.dtype)
    return x.contiguous(), weight.contiguous(), other.contiguous(), chosen


def _add_gradients(chosen: str, hidden, x, cu_seqlens, weight, grad_x, grad_weight) -> None:
    """Gradients of x and weight, where they are wanted (not empty), from those of the values before GELU."""
    rows, channels = len(hidden), x.shape[1]
    flat, flat_gradient = weight.view(len(weight), 3 * channels), grad_weight.view(-1, 3 * channels)
    if chosen == "cpp":
        if grad_weight.numel():
            conv_products.weight_gradient(conv_products.stored(x, cu_seqlens, rows), hidden, grad_weight)
        for first in range(0, rows, _SCATTER_ROWS) if grad_x.numel() else ():
            native.ops().conv_scatter(hidden[first : first + _SCATTER_ROWS] @ flat, cu_seqlens, first, grad_x)
        return
    if grad_weight.numel():
        torch.mm(hidden.t(), _columns(x, cu_seqlens, rows), out=flat_gradient)
    if grad_x.numel():
        taps = downsample_taps(cu_seqlens, rows)
        columns = (hidden @ flat).view(rows, channels, 3).transpose(1, 2).reshape(3 * rows, channels)
        grad_x.copy_(torch.zeros_like(pad(grad_x, (0, 0, 1, 0))).index_add_(0, taps.flatten(), columns)[1:])


def in_torch(x, cu_seqlens, weight, bias, before, out) -> None:
    """Write the values before GELU and after it; both may be one tensor."""
    torch.add(linear(_columns(x, cu_seqlens, len(out)), weight.view(len(weight), -1)), bias, out=before)
    out.copy_(gelu(before))


def _columns(x: torch.Tensor, cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """The frames that every output reads, in the weight's order, `[rows, in_width * 3]`."""
    taps = downsample_taps(cu_seqlens, rows)
    gathered = pad(x, (0, 0, 1, 0)).index_select(0, taps.flatten())
    return gathered.view(rows, 3, x.shape[1]).transpose(1, 2).reshape(rows, 3 * x.shape[1])


def downsample_taps(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows that each output reads, `[rows, 3]` int64, counted from 1; 0 stands for the zero row outside the segment."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    outputs = (ends - starts + 1) // 2
    segment = torch.repeat_interleave(outputs, output_size=rows)
    inside = torch.arange(rows, device=cu_seqlens.device) - (outputs.cumsum(0) - outputs)[segment]
    first = starts[segment]
    tap = (first + 2 * inside)[:, None] + torch.arange(-1, 2, device=cu_seqlens.device)
    return torch.where((tap >= first[:, None]) & (tap < ends[segment][:, None]), tap + 1, 0)


def upsample_taps(cu_seqlens: torch.Tensor, frames: int) -> torch.Tensor:
    """Output that reads each frame through each tap, `[frames, 3]` int32; -1 where none does."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    outputs = (ends - starts + 1) // 2
    segment = torch.repeat_interleave(ends - starts, output_size=frames)
    frame = (torch.arange(frames, device=cu_seqlens.device) - starts[segment])[:, None]
    # Tap t of output o reads frame 2 o + t - 1.
    twice = frame + 1 - torch.arange(3, device=cu_seqlens.device)
    output = torch.div(twice, 2, rounding_mode="floor")
    read = (twice % 2 == 0) & (output >= 0) & (output < outputs[segment][:, None])
    return torch.where(read, (outputs.cumsum(0) - outputs)[segment][:, None] + output, -1).int()
