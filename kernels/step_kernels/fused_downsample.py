"""From the encoder's hidden frames to the adaptor's in one kernel: 50 Hz -> 25 Hz -> 12.5 Hz over packed audio segments.

    feature[i] = LayerNorm((hidden[2 i] + hidden[2 i + 1]) / 2), rounded to the type in which features are stored
    out[o] = GELU(bias + weight[:, :, 0] feature[2 o - 1] + weight[:, :, 1] feature[2 o] + weight[:, :, 2] feature[2 o + 1])

It is `pool_norm_downsample` and `conv_downsample_gelu` in one, for where neither a cache nor a transfer lies between encoder and
adaptor: the features are made where they are multiplied and never written, except for backward. Where one does lie between, the
features are rounded (bfloat16); here they are rounded all the same, so both ways give the same values up to the order of sums.

The encoder is frozen: hidden state and layer norm get no gradient, and one that requires it is refused. For the weight's gradient
the features are kept in their stored type: a quarter of the float32 hidden state, and cheaper than making them again.

Source: Step-Audio 2, where encoder and adaptor meet (`avg_pooler`, the encoder's final layer norm, the adaptor's `conv`, GELU).
"""

from __future__ import annotations

import torch

from step_kernels import conv_downsample, conv_products, registry
from step_kernels.operators import operator
from step_kernels.pool_norm_downsample import in_torch as pool_norm_in_torch
from step_kernels.pool_norm_downsample import pool_norm_downsample_reference, source_rows
from step_kernels.segments import check_counts
from step_kernels.triton_language import jit, tl, triton

OP = "fused_downsample"
registry.register(OP, triton=(*registry.HALF, torch.float32), cpp=(torch.float32,))

# Wide tiles: every column of programs normalises the frames anew. In float32 (three tf32 products for one) the operands fill a
# block's memory at half the depth.
_HALF = {"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_FLOAT = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}


def fused_downsample_reference(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stored: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Define the op in plain torch; every backend is tested against this, in float64.

    Args:
        hidden: `[frames at 50 Hz, width]`, segments packed back to back.
        cu_seqlens: `[segments + 1]` int32, their bounds in `hidden`.
        norm_weight, norm_bias, eps: the layer norm's.
        weight: `[out_width, width, 3]`, as `torch.nn.Conv1d` holds it.
        bias: `[out_width]`.
        stored: type that features are rounded to.

    Returns:
        `[sum((length // 2 + 1) // 2), out_width]` in `weight`'s dtype.
    """
    features = pool_norm_downsample_reference(hidden, cu_seqlens, norm_weight, norm_bias, eps)
    features = features.to(stored).to(weight.dtype)
    return conv_downsample.conv_downsample_gelu_reference(features, feature_starts(cu_seqlens), weight, bias)


def fused_downsample(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    frames: int,
    rows: int,
    stored: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Pool, normalise and convolve packed segments; arguments as in `fused_downsample_reference`.

    Args:
        frames: of all segments at 25 Hz, `sum(length // 2)`.
        rows: of the result, `sum((length // 2 + 1) // 2)`. Both are known to the packer: the host never waits for the device.

    Raises:
        ValueError: shapes or types that do not fit; hidden state or layer norm require gradients, but the encoder is frozen; or
            bounds in CPU memory that do not fit `hidden`, `frames` or `rows` (on a device nobody looks).
    """
    width = hidden.shape[-1]
    if hidden.dim() != 2 or weight.dim() != 3 or weight.shape[1:] != (width, 3) or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be "
            "[frames, width], [out, width, 3] and [out]"
        )
    if norm_weight.shape != (width,) or norm_bias.shape != (width,):
        raise ValueError(f"{OP}: layer norm of {tuple(norm_weight.shape)} and {tuple(norm_bias.shape)} for rows of {width}")
    if {norm_weight.dtype, norm_bias.dtype} != {hidden.dtype} or bias.dtype != weight.dtype:
        types = ", ".join(str(each.dtype) for each in (hidden, norm_weight, norm_bias, weight, bias))
        raise ValueError(f"{OP}: the layer norm must be of hidden's type and bias of weight's, not {types}")
    if torch.is_grad_enabled() and any(each.requires_grad for each in (hidden, norm_weight, norm_bias)):
        raise ValueError(f"{OP} gives the encoder no gradient, it is frozen; use the reference to train it")
    trained = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    starts = feature_starts(cu_seqlens)
    return _op(hidden, cu_seqlens, starts, norm_weight, norm_bias, eps, weight, bias, frames, rows, stored, trained)[0]


def feature_starts(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Bounds of the segments at 25 Hz from those at 50 Hz, without reading anything back to the host."""
    features = torch.div(cu_seqlens.diff(), 2, rounding_mode="floor")
    return torch.nn.functional.pad(features.cumsum(0, dtype=torch.int32), (1, 0))


@operator("step::fused_downsample")
def _op(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor,
    frames: int,
    rows: int,
    stored: torch.dtype,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result and, if backward will want them (`keep`), the features and the values before GELU."""
    counts = {"frames": (frames, lambda lengths: lengths // 2), "rows": (rows, lambda lengths: (lengths // 2 + 1) // 2)}
    check_counts(OP, len(hidden), cu_seqlens, **counts)
    out = weight.new_empty(rows, len(weight))
    before = torch.empty_like(out) if keep else out
    features = hidden.new_empty(frames if keep else 0, hidden.shape[1], dtype=stored)
    chosen = registry.backend(OP, weight, _unfit(hidden, stored))
    hidden, norm_weight, norm_bias = hidden.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    weight, bias, norm = weight.contiguous(), bias.contiguous(), (norm_weight, norm_bias, eps)
    if chosen == "cpp":
        source = conv_products.pooled(hidden, cu_seqlens, norm, features, keep, starts, rows)
        conv_products.convolve(source, weight, bias, before, out)
    elif chosen == "triton":
        _triton(hidden, cu_seqlens, starts, norm, weight, bias, frames, features, before, out, keep)
    else:
        made = pool_norm_in_torch(hidden, cu_seqlens, *norm, frames).to(stored)
        conv_downsample.in_torch(made.to(weight.dtype), starts, weight, bias, before, out)
        features = made if keep else features
    return out, features, before if keep else out.new_empty(0)


@_op.register_fake
def _(hidden, cu_seqlens, starts, norm_weight, norm_bias, eps, weight, bias, frames, rows, stored, keep):
    out = weight.new_empty(rows, weight.shape[0])
    features = hidden.new_empty(frames if keep else 0, hidden.shape[1], dtype=stored)
    return out, features, torch.empty_like(out) if keep else out.new_empty(0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], inputs[6], output[2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, *_):
    """The backward pass is the convolution's, with the features as they were kept."""
    weight_wanted, bias_wanted = ctx.needs_input_grad[6:8]
    if gradient is None:
        return (None,) * 12
    _, grad_weight, grad_bias = conv_downsample.backward(gradient, *ctx.saved_tensors, False, weight_wanted)
    return *(None,) * 6, grad_weight if weight_wanted else None, grad_bias if bias_wanted else None, *(None,) * 4


_op.register_autograd(_differentiate, setup_context=_save)


def _unfit(hidden: torch.Tensor, stored: torch.dtype) -> dict[str, str]:
    """What the C++ kernel does not take of this call."""
    if hidden.dtype != torch.float32:
        return {"cpp": f"a hidden state in {hidden.dtype}"}
    return {} if stored in (torch.float32, torch.bfloat16) else {"cpp": f"features in {stored}"}


@jit
def _pooled(hidden, place, inside, width):
    """Mean of two rows of the hidden state that follow each other, float32; 0 outside."""
    first = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    return 0.5 * (first + tl.load(hidden + place + width, mask=inside, other=0.0).to(tl.float32))


@jit
def _statistics(hidden, first, present, width, eps, BLOCK_K: tl.constexpr):
    """Mean of each frame and one over its deviation; `first` is where its two hidden rows begin.

    A pass over the rows with the second moment about the mean, block by block (Chan et al. 1979).
    """
    mean, moment = tl.zeros_like(first).to(tl.float32), tl.zeros_like(first).to(tl.float32)
    for begin in range(0, width, BLOCK_K):
        channel = begin + tl.arange(0, BLOCK_K)
        pooled = _pooled(hidden, first[:, None] + channel[None, :], present[:, None] & (channel < width)[None, :], width)
        count = tl.minimum(width - begin, BLOCK_K)
        block_mean = tl.sum(pooled, 1) / count
        centred = tl.where((channel < width)[None, :], pooled - block_mean[:, None], 0.0)
        change = block_mean - mean
        moment += tl.sum(centred * centred, 1) + change * change * (begin * count / (begin + count))
        mean += change * (count / (begin + count))
    return mean, tl.rsqrt(moment / width + eps)


@jit
def fused_downsample_kernel(
    hidden,
    taps,
    source,
    norm_weight,
    norm_bias,
    weight,
    bias,
    features,
    before,
    out,
    rows,
    width,
    out_width,
    eps,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of outputs, tap by tap: first mean and deviation of the frames that the tap reads, then their product.

    hidden `[*, width]`; taps `[rows, 3]`, the frame that each output reads through each tap, -1 for none; source `[frames]`, the
    first of a frame's two hidden rows; weight `[3, width, out_width]`. `features`, of which `KEEP` wants the values, says by its
    type what features are rounded to.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in tl.static_range(3):
        frame = tl.load(taps + row * 3 + tap, mask=row < rows, other=-1)
        first = tl.load(source + frame, mask=frame >= 0, other=0).to(tl.int64) * width
        mean, scale = _statistics(hidden, first, frame >= 0, width, eps, BLOCK_K)
        for begin in range(0, width, BLOCK_K):
            channel = begin + tl.arange(0, BLOCK_K)
            inside = (frame >= 0)[:, None] & (channel < width)[None, :]
            pooled = _pooled(hidden, first[:, None] + channel[None, :], inside, width)
            factor = tl.load(norm_weight + channel, mask=channel < width, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias + channel, mask=channel < width, other=0.0).to(tl.float32)
            normal = (pooled - mean[:, None]) * scale[:, None] * factor[None, :] + shift[None, :]
            # As the two ops round on the way from one to the other.
            feature = normal.to(hidden.dtype.element_ty).to(features.dtype.element_ty)
            if KEEP and tap > 0:
                # Every frame is the middle one or the last of one output; one column of programs writes them.
                place = features + frame.to(tl.int64)[:, None] * width + channel[None, :]
                tl.store(place, feature, mask=inside & (tl.program_id(1) == 0))
            left = tl.where(inside, feature.to(weight.dtype.element_ty), 0.0)
            place = weight + (tap * width + channel).to(tl.int64)[:, None] * out_width + column[None, :]
            right = tl.load(place, mask=(channel < width)[:, None] & (column < out_width)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
    place = row.to(tl.int64)[:, None] * out_width + column[None, :]
    inside = (row < rows)[:, None] & (column < out_width)[None, :]
    total += tl.load(bias + column, mask=column < out_width, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(before + place, total.to(before.dtype.element_ty), mask=inside)
    total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def _triton(hidden, cu_seqlens, starts, norm, weight, bias, frames, features, before, out, keep) -> None:
    rows, out_width = out.shape
    if not rows:
        return
    taps = (conv_downsample.downsample_taps(starts, rows) - 1).int()
    source = source_rows(cu_seqlens, frames).int()
    tile = _FLOAT if weight.dtype == torch.float32 else _HALF
    grid = (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(out_width, tile["BLOCK_N"]))
    by_tap = weight.permute(2, 1, 0).contiguous()
    tensors = hidden, taps, source, norm[0], norm[1], by_tap, bias, features, before, out
    flags = {"KEEP": keep, "PRECISION": "tf32x3"}
    fused_downsample_kernel[grid](*tensors, rows, hidden.shape[1], out_width, norm[2], **flags, **tile)


def aot_kernels():
    """What the ahead-of-time inspection compiles: encoder and adaptor of the 32B model, 8,192 audio tokens."""
    rows, width = 8192, 1280
    flops = 2 * rows * 3 * width * width + 8 * 2 * rows * width
    for name, size, tile in (("bf16", 2, _HALF), ("fp16", 2, _HALF), ("fp32", 4, _FLOAT)):
        moved = size * (4 * rows * width + 3 * width * width + rows * width)
        typed = dict.fromkeys(("hidden", "norm_weight", "norm_bias", "weight", "bias", "before", "out"), f"*{name}")
        tensors = typed | {"taps": "*i32", "source": "*i32", "features": "*bf16"}
        sizes = dict.fromkeys(("rows", "width", "out_width"), "i32")
        constants = {key: value for key, value in tile.items() if key.startswith("BLOCK")} | {"PRECISION": "tf32x3"}
        for label, keep, more in (("", False, 0), (", for training", True, 2 * 2 * rows * width + size * rows * width)):
            yield (
                f"{OP} {rows} x {width} {name}{label}",
                fused_downsample_kernel,
                tensors | sizes | {"eps": "fp32"},
                constants | {"KEEP": keep},
                [*tensors, *sizes],
                tile["num_warps"],
                tile["num_stages"],
                flops,
                moved + more,
            )
