"""Matrix products in one canonical shape, so that the bits of a row do not depend on how many rows come with it.

A BLAS library picks another kernel (another order of summation) for another number of rows. The frozen encoder's outputs are cached
and shared between ranks, so they must depend on the clip alone: every product there runs on blocks of exactly `block` rows, the last
one filled up with zeros. Within a block, a row's bits depend neither on its place nor on the other rows (tested).
"""

from collections.abc import Iterator

import torch


def canonical_blocks(x: torch.Tensor, block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Cut `x` `[rows, ...]` into pieces of exactly `block` rows.

    Yields:
        the slice of `x` that the piece stands for, and the piece; rows beyond the slice are zeros, to be dropped from the result.
    """
    for start in range(0, x.shape[0], block):
        piece = x[start : start + block]
        rows = piece.shape[0]
        if rows < block:
            piece = torch.cat([piece, piece.new_zeros(block - rows, *piece.shape[1:])])
        yield slice(start, start + rows), piece
