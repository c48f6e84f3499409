"""Host-side arithmetic on packed segments, shared by the ops: plain numbers in, no device involved."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch


def cumulative(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Starts of the segments and the total, `[segments + 1]` int32 on `device`, without waiting for the device."""
    device = torch.device(device)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return starts.to(device, non_blocking=True)


def equal_runs(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Group neighbouring segments of one shape: yields `(segments, length, valid)` in order, empty segments left out.

    A run is a plain slice of the packed rows, so it becomes one batched call without copying anything.
    """
    for (length, valid), run in groupby(shapes):
        if length:
            yield sum(1 for _ in run), length, valid


def check_packed(name: str, rows: int, cu_seqlens: torch.Tensor, lengths: Sequence[int]) -> None:
    """Refuse host lengths that do not describe the packed rows; reads shapes only, never the device.

    Raises:
        ValueError: if the lengths do not add up to `rows`, or `cu_seqlens` is for another number of segments.
    """
    if sum(lengths) != rows:
        raise ValueError(f"{name}: {len(lengths)} segments hold {sum(lengths)} rows, but the packed tensor has {rows}")
    if cu_seqlens.numel() != len(lengths) + 1:
        raise ValueError(f"{name}: cu_seqlens describes {cu_seqlens.numel() - 1} segments, the host lengths {len(lengths)}")
