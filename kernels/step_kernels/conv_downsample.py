"""Strided convolution and GELU over packed audio segments: the adaptor's 25 Hz -> 12.5 Hz step.

    out[o] = GELU(bias + weight[:, :, 0] x[2 o - 1] + weight[:, :, 1] x[2 o] + weight[:, :, 2] x[2 o + 1])

for `o` in `0 .. (length - 1) // 2` of each segment: Conv1d(kernel 3, stride 2, padding 1) per segment. A frame outside the
segment reads zero, whatever lies next door in the pack. An empty segment gives nothing. Differentiable in `x`, `weight`, `bias`.

Source: Step-Audio 2 adaptor (`conv`, then GELU); GELU is the exact one (erf).
"""

import torch
from torch.nn.functional import conv1d, gelu, linear, pad

from step_kernels import registry

OP = "conv_downsample_gelu"
registry.register(OP)


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
        rows: number of output rows, `sum((length + 1) // 2)`, known to the packer, so that the host never waits for the device.
    """
    registry.backend(OP, x)
    taps = downsample_taps(cu_seqlens, rows)
    columns = pad(x, (0, 0, 1, 0)).index_select(0, taps.flatten()).view(rows, 3 * x.shape[1])
    return gelu(linear(columns, weight.transpose(1, 2).reshape(weight.shape[0], -1), bias))


def downsample_taps(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows that each output reads, `[rows, 3]` int64, counted from 1; 0 stands for the zero row outside the segment."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    outputs = (ends - starts + 1) // 2
    segment = torch.repeat_interleave(outputs, output_size=rows)
    inside = torch.arange(rows, device=cu_seqlens.device) - (outputs.cumsum(0) - outputs)[segment]
    first = starts[segment]
    tap = (first + 2 * inside)[:, None] + torch.arange(-1, 2, device=cu_seqlens.device)
    return torch.where((tap >= first[:, None]) & (tap < ends[segment][:, None]), tap + 1, 0)
