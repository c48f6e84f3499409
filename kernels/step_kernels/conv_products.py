"""Matrix products of the strided convolution on a CPU, for `conv_downsample_gelu` and `fused_downsample`.

Few rows: what an output reads lies side by side, for a block of outputs at a time, and one product with the weight follows.

Many rows: three outputs of a segment that follow each other are a tile, with five products instead of six behind the odd frames
(minimal filtering F(3, 2), points 0, 1, -1 and infinity; Winograd 1980). With the tile's even frames e0 e1 e2, the odd frames
q0 ... q3 around them, S = (W0 + W2) / 2 and D = (W0 - W2) / 2:

    y0 = W1 e0 + W0 (q0 - q2) + s + d        s = S (q1 + q2)
    y1 = W1 e1                + s - d        d = D (q2 - q1)
    y2 = W1 e2 + W2 (q3 - q1) + s + d

Seven products instead of nine for a tile. Its gradient is the transpose: that of W0 (q0 - q2) is y0's, that of s is the sum of
all three, that of d is y0 - y1 + y2's. A frame that the segment lacks is zero, so a tile looks at nothing beyond its segment, and
tiles are counted from its start: what neighbours in the pack hold changes no bit. Their size may, for a pack goes by tiles as a
whole or not at all, and the two sum in another order. A NaN reaches all outputs of its tile.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from step_kernels import native

# Outputs, or tiles, whose frames are gathered at once: with fewer, products spend their time packing the weight again and again.
_BLOCK_ROWS, _BLOCK_TILES = 2048, 1024
# The weight's planes take as long as so many rows of one product, forward and (smaller products, too) in the weight's gradient.
_FORWARD_ROWS, _GRADIENT_ROWS = 400, 650


@dataclass(frozen=True)
class Source:
    """Where frames come from.

    Attributes:
        cu_seqlens: `[segments + 1]` int32, bounds of the segments in frames.
        width: of a frame.
        rows: outputs of all segments, `sum((length + 1) // 2)`.
        gather: `gather(first, out)` writes the operand from output `first` on, `[rows, 3 * width]`, or from tile `first` on,
            `[7, tiles, width]`.
    """

    cu_seqlens: torch.Tensor
    width: int
    rows: int
    gather: Callable[[int, torch.Tensor], None]

    def tiles(self, overhead: int) -> int:
        """How many tiles the segments have, or 0 where they do not pay, for `overhead` rows of one product are lost by them."""
        if 2 * self.rows <= 3 * overhead:
            return 0
        outputs = torch.div(self.cu_seqlens.diff() + 1, 2, rounding_mode="floor")
        tiles = int(torch.div(outputs + 2, 3, rounding_mode="floor").sum())
        return tiles if 7 * tiles + overhead < 3 * self.rows else 0


def stored(x: torch.Tensor, cu_seqlens: torch.Tensor, rows: int) -> Source:
    """Frames `[frames, width]` as they are, float32 or bfloat16."""
    return Source(cu_seqlens, x.shape[1], rows, lambda first, out: native.ops().conv_gather(x, cu_seqlens, first, out))


def pooled(
    hidden: torch.Tensor,
    hidden_starts: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float],
    features: torch.Tensor,
    keep: bool,
    cu_seqlens: torch.Tensor,
    rows: int,
) -> Source:
    """Frames made from hidden rows, two each, as they are gathered.

    Args:
        hidden: `[rows at twice the rate, width]` float32, bounds of its segments `hidden_starts`.
        norm: weight, bias and epsilon of the layer norm.
        features: frames are rounded to its dtype, float32 or bfloat16; with `keep` they are written to it, `[frames, width]`.
    """
    kept, rounded = features if keep else features[:0], features.dtype == torch.bfloat16

    def gather(first: int, out: torch.Tensor) -> None:
        native.ops().pool_norm_gather(hidden, hidden_starts, *norm, rounded, kept, cu_seqlens, first, out)

    return Source(cu_seqlens, hidden.shape[1], rows, gather)


def convolve(source: Source, weight: torch.Tensor, bias: torch.Tensor, before: torch.Tensor, out: torch.Tensor) -> None:
    """Write the values before GELU and after it, `[rows, out_width]`; both may be one tensor."""
    if tiles := source.tiles(_FORWARD_ROWS):
        _convolve_tiles(source, tiles, weight, bias, before, out)
        return
    flat = weight.view(len(weight), -1)
    for first, columns in _blocks(source.rows, _BLOCK_ROWS, lambda size: weight.new_empty(size, 3 * source.width)):
        part = slice(first, first + len(columns))
        source.gather(first, columns)
        torch.mm(columns, flat.t(), out=before[part])
        native.ops().bias_gelu(before[part], bias, out[part])


def weight_gradient(source: Source, hidden: torch.Tensor, out: torch.Tensor) -> None:
    """Write the weight's gradient `[out_width, width, 3]` from that of the values before GELU, `[rows, out_width]`."""
    if tiles := source.tiles(_GRADIENT_ROWS):
        _weight_gradient_tiles(source, tiles, hidden, out)
        return
    flat = out.view(len(out), 3 * source.width)
    if not source.rows:
        out.zero_()
    for first, columns in _blocks(source.rows, _BLOCK_ROWS, lambda size: hidden.new_empty(size, 3 * source.width)):
        source.gather(first, columns)
        flat.addmm_(hidden[first : first + len(columns)].t(), columns, beta=int(first > 0))


def _convolve_tiles(source, tiles, weight, bias, before, out) -> None:
    planes = weight.new_empty(5, *weight.shape[:2])
    native.ops().conv_split_weight(weight, planes)
    middle, first_tap, last_tap, half_sum, half_difference = (plane.t() for plane in planes)
    for first, frames in _blocks(tiles, _BLOCK_TILES, lambda size: weight.new_empty(7, size, source.width)):
        source.gather(first, frames)
        products = weight.new_empty(5, frames.shape[1], len(weight))
        torch.mm(frames[:3].flatten(0, 1), middle, out=products[:3].view(-1, len(weight)))
        products[0].addmm_(frames[3], first_tap)
        products[2].addmm_(frames[4], last_tap)
        torch.mm(frames[5], half_sum, out=products[3])
        torch.mm(frames[6], half_difference, out=products[4])
        native.ops().conv_join_tiles(products, source.cu_seqlens, bias, first, before, out)


def _weight_gradient_tiles(source, tiles, hidden, out) -> None:
    planes = hidden.new_empty(5, *out.shape[:2])
    for first, frames in _blocks(tiles, _BLOCK_TILES, lambda size: hidden.new_empty(7, size, source.width)):
        source.gather(first, frames)
        gradients = hidden.new_empty(5, frames.shape[1], len(out))
        native.ops().conv_gradient_tiles(hidden, source.cu_seqlens, first, gradients)
        beta = int(first > 0)
        planes[0].addmm_(gradients[:3].flatten(0, 1).t(), frames[:3].flatten(0, 1), beta=beta)
        for plane, gradient, sums in zip(planes[1:], (0, 2, 3, 4), frames[3:], strict=True):
            plane.addmm_(gradients[gradient].t(), sums, beta=beta)
    native.ops().conv_join_weight(planes, out)


def _blocks(count: int, largest: int, allocate: Callable[[int], torch.Tensor]):
    """`(first, buffer)` for blocks of nearly equal size: a small last one would cost nearly as much as a whole one."""
    if not count:
        return
    size = -(-count // -(-count // largest))
    buffer = allocate(size)
    for first in range(0, count, size):
        # The last block may be smaller: a plane's rows must still follow each other.
        yield first, buffer if first + size <= count else allocate(count - first)
