"""Average-pool by two and LayerNorm over packed audio segments: the encoder's 50 Hz -> 25 Hz tail.

    pooled[o] = LayerNorm((hidden[i] + hidden[i + 1]) / 2)

`i` runs over the even frames of each segment; an odd last frame is dropped, as AvgPool1d(2, 2) does.
Forward only: the encoder is frozen. A hidden state that requires gradients is refused.

Source: Step-Audio 2 / Qwen2-Audio encoder (`avg_pooler`, then the final layer norm).
"""

import torch

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.segments import check_counts

OP = "pool_norm_downsample"
registry.register(OP, cuda=(torch.float32, *registry.HALF), cpp=(torch.float32,))


def pool_norm_downsample_reference(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Define the op in plain torch; every backend is tested against this, in float64.

    Args:
        hidden: `[frames, width]`, segments packed back to back, 50 Hz.
        cu_seqlens: `[segments + 1]` int32, `cu_seqlens[0] == 0`, non-decreasing, last = frames.
        weight, bias: `[width]`, the layer norm's.
        eps: the layer norm's epsilon.

    Returns:
        `[sum(length // 2), width]`, 25 Hz, in `hidden`'s dtype.
    """
    pooled = [
        hidden[start : start + (end - start) // 2 * 2].unflatten(0, (-1, 2)).mean(1)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        if end - start >= 2
    ]
    pooled = torch.cat([hidden[:0], *pooled])
    return torch.nn.functional.layer_norm(pooled, weight.shape, weight, bias, eps)


def pool_norm_downsample(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rows: int
) -> torch.Tensor:
    """Pool and normalise packed segments; arguments as in `pool_norm_downsample_reference`.

    Args:
        rows: number of output rows, `sum(length // 2)`, known to the packer, so that the host never waits for the device.

    Raises:
        ValueError: `hidden` requires gradients, but the op is forward only; or bounds in CPU memory that do not fit `hidden` or
            `rows` (on a device nobody looks).
    """
    if hidden.requires_grad and torch.is_grad_enabled():
        raise ValueError("pool_norm_downsample is forward only: the encoder is frozen; use the reference to train it")
    return _op(hidden, cu_seqlens, weight, bias, eps, rows)


@operator("step::pool_norm_downsample")
def _op(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, rows: int
) -> torch.Tensor:
    check_counts(OP, len(hidden), cu_seqlens, rows=(rows, lambda lengths: lengths // 2))
    chosen = registry.backend(OP, hidden)
    if chosen == "torch":
        return in_torch(hidden, cu_seqlens, weight, bias, eps, rows)
    out = hidden.new_empty(rows, hidden.shape[1])
    hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
    if chosen == "cpp":
        native.ops().pool_norm_downsample(hidden, cu_seqlens, weight, bias, eps, out)
    else:
        native.ops().pool_norm_downsample_rows(hidden, source_rows(cu_seqlens, rows).int(), weight, bias, eps, out)
    return out


@_op.register_fake
def _(hidden, cu_seqlens, weight, bias, eps, rows):
    return hidden.new_empty(rows, hidden.shape[1])


def in_torch(hidden, cu_seqlens, weight, bias, eps, rows):
    """The op as plain torch over the packed rows."""
    first = source_rows(cu_seqlens, rows)
    pooled = hidden.index_select(0, first).add_(hidden.index_select(0, first + 1)).mul_(0.5)
    return torch.nn.functional.layer_norm(pooled, weight.shape, weight, bias, eps)


def cuda_kernels():
    """What the ahead-of-time inspection looks at, see `step_kernels.inspect`."""
    rows = 8192
    # A sum for the pool, then five operations: mean, centred, squared, scaled, shifted.
    for width, kernel in ((1280, "warp"), (512, "warp"), (4096, "block")):
        for name, size, mangled in (("fp32", 4, "f"), ("bf16", 2, "13__nv_bfloat16"), ("fp16", 2, "6__half")):
            vectors = f"Li{width * size // 512}E" if kernel == "warp" else "E"
            entry = f"pool_norm_{kernel}I{mangled}{vectors}"
            flops, moved, shared = 8 * rows * width, 3 * rows * width * size, 0 if kernel == "warp" else 4 * width
            yield f"{OP}.pool_norm_{kernel} {rows} x {width} {name}", "pool_norm_downsample.cu", entry, shared, flops, moved


def source_rows(cu_seqlens: torch.Tensor, rows: int) -> torch.Tensor:
    """First input row of each output row, `[rows]` int64, without reading anything back to the host."""
    starts, pooled = cu_seqlens[:-1].long(), cu_seqlens.diff().long() // 2
    # Output row o of a segment whose outputs begin at p reads input row start + 2 (o - p).
    shift = torch.repeat_interleave(starts - 2 * (pooled.cumsum(0) - pooled), pooled, output_size=rows)
    return shift + 2 * torch.arange(rows, device=cu_seqlens.device)
