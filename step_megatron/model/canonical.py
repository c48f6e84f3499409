"""Computing in one canonical way, so that the bits of a row do not depend on how many rows or threads come with it.

A BLAS library picks another kernel (another order of summation) for another number of rows, and splits the sum itself over
threads when there are few rows (measured: MKL, 256 rows of width 2,048, two threads). The frozen encoder's outputs are cached and
shared between ranks, so they must depend on the clip alone. Therefore every product runs on blocks of exactly `block` rows, the
last one filled up with zeros, and on one thread; several threads each compute packs of their own. Within a block, a row's bits
depend neither on its place nor on the other rows (tested).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let torch use a single CPU thread for the operators called here; does nothing for other devices."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_threads(function: Callable[[_Item], _Result], items: Sequence[_Item], device: torch.device) -> list[_Result]:
    """Apply `function`, which computes on one thread, to all items: one item a thread on a CPU, one after the other elsewhere."""
    threads = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1
    if threads <= 1:
        return [function(item) for item in items]
    before = torch.get_num_threads()
    try:
        # OpenMP's thread count belongs to the calling thread, so each worker sets its own.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(before)
