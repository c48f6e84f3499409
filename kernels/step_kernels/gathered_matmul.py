"""Triton kernels of `conv_downsample_gelu`: matrix products whose rows are read by number, three taps each.

    out[r] = sum_tap x[taps[r, tap]] weight[tap]        + bias, GELU        a row number of -1 reads zeros

The taps are one long inner dimension, so a tile of outputs stays in registers over all of them and x is gathered straight into
the product's operand; rows are contiguous, so a gathered tile is read with 16 bytes a thread as any other.
"""

from __future__ import annotations

import torch

from step_kernels.triton_language import jit, tl, triton

# 128 x 128 tiles over 64 channels: two warp groups, each with 64 rows of a wgmma; both operands of two steps are 64 KB.
_FORWARD = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_WEIGHT = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@jit
def gathered_matmul_kernel(
    x,
    taps,
    weight,
    bias,
    before,
    out,
    rows,
    width,
    out_width,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x `[*, width]`, taps `[rows, 3]`, weight `[3, width, out_width]`; `before` gets the values before GELU if `KEEP`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks = tl.cdiv(width, BLOCK_K)
    for step in range(0, 3 * blocks):
        tap = step // blocks
        channel = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        source = tl.load(taps + row * 3 + tap, mask=row < rows, other=-1)
        inside = (source >= 0)[:, None] & (channel < width)[None, :]
        left = tl.load(x + source.to(tl.int64)[:, None] * width + channel[None, :], mask=inside, other=0.0)
        place = weight + (tap * width + channel).to(tl.int64)[:, None] * out_width + column[None, :]
        right = tl.load(place, mask=(channel < width)[:, None] & (column < out_width)[None, :], other=0.0)
        total = tl.dot(left, right, total)
    place = row.to(tl.int64)[:, None] * out_width + column[None, :]
    inside = (row < rows)[:, None] & (column < out_width)[None, :]
    if GELU:
        total += tl.load(bias + column, mask=column < out_width, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            tl.store(before + place, total.to(before.dtype.element_ty), mask=inside)
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@jit
def gathered_weight_gradient_kernel(
    hidden,
    x,
    taps,
    gradient,
    rows,
    width,
    out_width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """gradient `[3, out_width, width]`: for each tap, hidden `[rows, out_width]` transposed times the gathered rows of x."""
    output = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = tl.program_id(2)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, rows, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        source = tl.load(taps + row * 3 + tap, mask=row < rows, other=-1)
        inside = (row < rows)[:, None] & (output < out_width)[None, :]
        left = tl.load(hidden + row.to(tl.int64)[:, None] * out_width + output[None, :], mask=inside, other=0.0)
        inside = (source >= 0)[:, None] & (channel < width)[None, :]
        right = tl.load(x + source.to(tl.int64)[:, None] * width + channel[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(left), right, total)
    place = gradient + (tap * out_width + output).to(tl.int64)[:, None] * width + channel[None, :]
    tl.store(place, total.to(gradient.dtype.element_ty), mask=(output < out_width)[:, None] & (channel < width)[None, :])


def gathered_matmul(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
) -> None:
    """Write the product, with bias and GELU where a bias is given, and the values before GELU where asked."""
    rows, out_width = out.shape
    if not rows:
        return
    grid = (triton.cdiv(rows, _FORWARD["BLOCK_M"]), triton.cdiv(out_width, _FORWARD["BLOCK_N"]))
    flags = {"GELU": bias is not None, "KEEP": before is not None}
    bias, before = out if bias is None else bias, out if before is None else before
    gathered_matmul_kernel[grid](x, taps, weight, bias, before, out, rows, x.shape[1], out_width, **flags, **_FORWARD)


def gathered_weight_gradient(hidden: torch.Tensor, x: torch.Tensor, taps: torch.Tensor, out: torch.Tensor) -> None:
    """Write the gradient of a convolution's weight, `[out_width, width, 3]`."""
    out_width, width, _ = out.shape
    by_tap = out.new_empty(3, out_width, width)
    grid = (triton.cdiv(out_width, _WEIGHT["BLOCK_M"]), triton.cdiv(width, _WEIGHT["BLOCK_N"]), 3)
    gathered_weight_gradient_kernel[grid](hidden, x, taps, by_tap, len(hidden), width, out_width, **_WEIGHT)
    out.copy_(by_tap.permute(1, 2, 0))


def aot_kernels():
    """What the ahead-of-time inspection compiles: the adaptor of the 32B model, 8,192 audio tokens in bfloat16."""
    rows, width = 8192, 1280
    flops = 2 * rows * 3 * width * width
    moved = 2 * (2 * rows * width + 3 * width * width + rows * width)
    sizes = dict.fromkeys(("rows", "width", "out_width"), "i32")
    tensors = {"x": "*bf16", "taps": "*i32", "weight": "*bf16", "bias": "*bf16", "before": "*bf16", "out": "*bf16"}
    weights = {"hidden": "*bf16", "x": "*bf16", "taps": "*i32", "gradient": "*bf16"}
    name = "conv_downsample_gelu 8192 x 1280"
    for label, kernel, signature, launch, flags in (
        (name, gathered_matmul_kernel, tensors | sizes, _FORWARD, {"GELU": True, "KEEP": True}),
        (f"{name}, input gradient", gathered_matmul_kernel, tensors | sizes, _FORWARD, {"GELU": False, "KEEP": False}),
        (f"{name}, weight gradient", gathered_weight_gradient_kernel, weights | sizes, _WEIGHT, {}),
    ):
        blocks = {key: value for key, value in launch.items() if key.startswith("BLOCK")}
        yield label, kernel, signature, blocks | flags, list(signature), launch["num_warps"], launch["num_stages"], flops, moved
