"""Passes over rows of logits for `linear_cross_entropy`: `Rows`, by every backend, and the kernels in torch and Triton.

In Triton one program has one row. That of a whole vocabulary in bfloat16 is 317 KB: too long for one block, short enough that
the rows in flight (one on each multiprocessor, 42 MB) are still in the second-level cache when they are read again. So a program
walks over its row in blocks, and the fused kernel, which needs the row twice, reads it from memory once.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from step_kernels import native, registry
from step_kernels.triton_language import jit, tl

# 16 bytes a thread and load at 16 warps; smaller rows take a block of their own length.
_BLOCK, _WARPS = 4096, 16


class Rows:
    """The two passes over a chunk's logits, by one backend; statistics are joined over the ranks that share the vocabulary."""

    def __init__(self, backend: str, start: int, group: str):
        self.backend, self.start, self.group = backend, start, group

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, gradient: bool
    ) -> None:
        """Write every row's loss; if wanted, replace the logits by the gradient of the weighted sum."""
        if self.backend == "triton" and not self.group:
            losses_triton(logits, labels, weights, out, self.start, gradient)
            return
        lse, target, _ = self.statistics(logits, labels, moments=False)
        torch.sub(lse, target, out=out)
        if gradient:
            self.gradient(logits, labels, lse, weights, None, -weights)

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-sum-exp, target logit and (with `moments`) entropy of every row, over the whole vocabulary."""
        if self.backend == "torch":
            found = statistics_torch(logits, labels - self.start, moments)
        else:
            found = logits.new_empty(4, len(labels), dtype=torch.float32)
            run = native.ops().softmax_statistics if self.backend == "cpp" else statistics_triton
            run(logits, labels, self.start, moments, found)
        largest, total, target, moment = self._join(found) if self.group else found
        log_total = total.log()
        return largest + log_total, target, log_total - moment / total

    def gradient(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        lse: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor | None,
        at_target: torch.Tensor,
    ) -> None:
        """Replace every logit by `p (first + second log p)`, p = e^(logit - lse), and add `at_target` at the label.

        `second` is None where no entropy has a gradient.
        """
        if self.backend == "torch":
            gradient_torch(logits, labels - self.start, lse, first, second, at_target)
            return
        if self.backend == "triton":
            gradient_triton(logits, labels, self.start, lse, first, second, at_target)
            return
        # It adds one product to an exponential there, so there is no other loop for none.
        second = torch.zeros_like(first) if second is None else second
        native.ops().softmax_gradient(logits, labels, self.start, lse, first, second, at_target)

    def _join(self, found: torch.Tensor) -> torch.Tensor:
        """Statistics of the whole vocabulary from each rank's, `[4, rows]`; the same bits on every rank."""
        group = resolve(self.group)
        shares = found.new_empty(4 * group.size(), found.shape[1])
        torch.distributed.all_gather_into_tensor(shares, found, group=group)
        largest, total, target, moment = shares.unflatten(0, (-1, 4)).unbind(1)
        most = largest.amax(0)
        below = largest - most
        factor = below.exp()
        return torch.stack((most, (total * factor).sum(0), target.sum(0), ((moment + total * below) * factor).sum(0)))


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[rows]` float32 of ids `[rows]` under the softmax of logits `[rows, vocabulary]`, in one pass over them.

    A row's bits depend on that row alone. Forward only: it serves generation, which has the logits anyway
    (`linear_log_probs` never holds them all).
    """
    rows = Rows(registry.backend("linear_cross_entropy", logits), 0, "")
    lse, target, _ = rows.statistics(logits.contiguous(), tokens, moments=False)
    return target - lse


def resolve(group: str) -> ProcessGroup:
    """The group of this name, as ops are given it."""
    return torch.distributed.distributed_c10d._resolve_process_group(group)


def exact(tensor: torch.Tensor) -> torch.dtype:
    """The type that sums and results are in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def statistics_torch(logits: torch.Tensor, target: torch.Tensor, moments: bool = True) -> torch.Tensor:
    """`softmax_statistics` of the native library, in torch; `target` counts from the first column."""
    values = logits.to(exact(logits))
    largest = values.amax(1)
    below = values - largest[:, None]
    power = below.exp()
    inside = (target >= 0) & (target < logits.shape[1])
    at = values.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    moment = (power * below).sum(1) if moments else torch.zeros_like(largest)
    return torch.stack((largest, power.sum(1), at.where(inside, 0), moment))


def gradient_torch(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None,
    at_target: torch.Tensor,
) -> None:
    """`softmax_gradient` of the native library, in torch; `second` None for zeros."""
    log_p = logits.to(lse.dtype) - lse[:, None]
    slope = first[:, None] if second is None else first[:, None] + second[:, None] * log_p
    gradient = log_p.exp() * slope
    inside = (target >= 0) & (target < logits.shape[1])
    at = target.clamp(0, logits.shape[1] - 1)[:, None]
    logits.copy_(gradient.scatter_add_(1, at, at_target.where(inside, 0)[:, None]))


@jit
def _row_statistics(row, width, BLOCK: tl.constexpr, MOMENTS: tl.constexpr):
    """Maximum m, sum of e^(x - m), sum of e^(x - m) (x - m); sums are kept per lane, so that a block costs one reduction."""
    lowest = -3.0e38
    largest = lowest
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        values = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
        values = tl.where(columns < width, values, lowest)
        before = largest
        largest = tl.maximum(before, tl.max(values, 0))
        factor = tl.exp(before - largest)
        below = values - largest
        power = tl.exp(below)
        if MOMENTS:
            moment = (moment + total * (before - largest)) * factor + power * below
        total = total * factor + power
    return largest, tl.sum(total, 0), tl.sum(moment, 0)


@jit
def _row_gradient(row, width, target, lse, first, second, at_target, BLOCK: tl.constexpr, MOMENTS: tl.constexpr):
    """Replace x by p (first + second (x - lse)), p = e^(x - lse), and add `at_target` at column `target`."""
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        log_p = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32) - lse
        slope = first + second * log_p if MOMENTS else first
        gradient = tl.exp(log_p) * slope + tl.where(columns == target, at_target, 0.0)
        tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < width)


@jit
def softmax_statistics_kernel(logits, labels, out, start, rows, width, BLOCK: tl.constexpr, MOMENTS: tl.constexpr):
    """`out[4, rows]`: maximum, sum, target logit (0 where another rank has it), moment."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * width
    largest, total, moment = _row_statistics(row, width, BLOCK, MOMENTS)
    target = tl.load(labels + index) - start
    inside = (target >= 0) & (target < width)
    tl.store(out + index, largest)
    tl.store(out + rows + index, total)
    tl.store(out + 2 * rows + index, tl.load(row + target, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + 3 * rows + index, moment)


@jit
def softmax_gradient_kernel(
    logits, labels, lse, first, second, at_target, start, width, BLOCK: tl.constexpr, MOMENTS: tl.constexpr
):
    """The gradient of every row, in place."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * width
    target = tl.load(labels + index) - start
    coefficients = tl.load(first + index), tl.load(second + index), tl.load(at_target + index)
    _row_gradient(row, width, target, tl.load(lse + index), *coefficients, BLOCK, MOMENTS)


@jit
def softmax_losses_kernel(logits, labels, weights, losses, start, width, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    """The loss of every row and, in place, the gradient of weight times loss, for a vocabulary that is whole on this device."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * width
    largest, total, _ = _row_statistics(row, width, BLOCK, False)
    lse = largest + tl.log(total)
    target = tl.load(labels + index) - start
    inside = (target >= 0) & (target < width)
    tl.store(losses + index, lse - tl.load(row + target, mask=inside, other=0.0).to(tl.float32))
    if GRADIENT:
        # The target logit has been read by every thread before one overwrites it.
        tl.debug_barrier()
        weight = tl.load(weights + index)
        _row_gradient(row, width, target, lse, weight, 0.0, -weight, BLOCK, False)


@jit
def scale_kernel(values, factor, count, BLOCK: tl.constexpr):
    """Multiply in place; a factor of one, which only the device knows, costs nothing."""
    scale = tl.load(factor)
    if scale != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + index, mask=index < count).to(tl.float32) * scale
        tl.store(values + index, scaled.to(values.dtype.element_ty), mask=index < count)


def _launch(width: int) -> dict[str, int]:
    block = min(_BLOCK, 1 << max(width - 1, 1).bit_length())
    return {"BLOCK": block, "num_warps": min(_WARPS, max(1, block // 256))}


def statistics_triton(logits: torch.Tensor, labels: torch.Tensor, start: int, moments: bool, out: torch.Tensor) -> None:
    """`softmax_statistics` of the native library, in Triton."""
    rows, width = logits.shape
    softmax_statistics_kernel[(rows,)](logits, labels, out, start, rows, width, MOMENTS=moments, **_launch(width))


def gradient_triton(
    logits: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    lse: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor | None,
    at_target: torch.Tensor,
) -> None:
    """`softmax_gradient` of the native library, in Triton; `second` None for zeros."""
    rows, width = logits.shape
    moments = second is not None
    per_row = lse, first, second if moments else first, at_target
    softmax_gradient_kernel[(rows,)](logits, labels, *per_row, start, width, MOMENTS=moments, **_launch(width))


def losses_triton(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, start: int, gradient: bool
) -> None:
    """Losses and, if asked, the gradient in place, in one kernel."""
    rows, width = logits.shape
    softmax_losses_kernel[(rows,)](logits, labels, weights, out, start, width, GRADIENT=gradient, **_launch(width))


def scale_triton(values: torch.Tensor, factor: torch.Tensor) -> None:
    """`scale` of the native library, in Triton."""
    if values.numel():
        scale_kernel[(-(-values.numel() // _BLOCK),)](values, factor, values.numel(), BLOCK=_BLOCK)


def aot_kernels():
    """What the ahead-of-time inspection compiles: the 32B vocabulary, a chunk of 1,024 tokens in bfloat16."""
    rows, width = 1024, 158_720
    elements, launch = rows * width, _launch(158_720)
    block, warps = {"BLOCK": launch["BLOCK"]}, launch["num_warps"]
    logits = {"logits": "*bf16", "labels": "*i64"}
    floats = dict.fromkeys(("lse", "first", "second", "at_target"), "*fp32")
    statistics = logits | {"out": "*fp32", "start": "i32", "rows": "i32", "width": "i32"}
    gradient = logits | floats | {"start": "i32", "width": "i32"}
    losses = logits | {"weights": "*fp32", "losses": "*fp32", "start": "i32", "width": "i32"}
    name = "linear_cross_entropy 1024 x 158720"
    # Exponentials, one fused multiply-add to take the maximum off and one to sum up, counted as five operations each time.
    for kernel, signature, flag, passes, moved in (
        (softmax_statistics_kernel, statistics, {"MOMENTS": True}, 1, 2),
        (softmax_gradient_kernel, gradient, {"MOMENTS": True}, 1, 4),
        (softmax_losses_kernel, losses, {"GRADIENT": True}, 2, 4),
    ):
        aligned = [each for each, kind in signature.items() if kind.startswith("*") or each == "width"]
        yield name, kernel, signature, block | flag, aligned, warps, 3, 5 * passes * elements, moved * elements
    elements = 158_720 * 5120
    signature = {"values": "*bf16", "factor": "*fp32", "count": "i32"}
    name = "linear_cross_entropy 158720 x 5120"
    yield name, scale_kernel, signature, {"BLOCK": _BLOCK}, list(signature), 4, 3, elements, 4 * elements
