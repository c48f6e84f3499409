"""Host-side arithmetic on packed segments, shared by the ops: plain numbers or CPU memory in, no device involved."""

from collections.abc import Callable, Iterator, Sequence
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


def check_counts(
    name: str, packed: int, cu_seqlens: torch.Tensor, **counts: tuple[int, Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    """Refuse bounds that do not describe the packed rows, or counts that the bounds contradict: kernels rely on both.

    Only bounds in CPU memory are looked at; to read those on a device, the host would have to wait for it.

    Args:
        packed: number of packed rows.
        counts: by the argument's name, its value and what it sums up, as a function of the segments' lengths.

    Raises:
        ValueError: bounds that do not rise from 0 to `packed`, or a count that is wrong.
    """
    if cu_seqlens.device.type != "cpu":
        return
    lengths = cu_seqlens.diff()
    if not len(cu_seqlens) or cu_seqlens[0] != 0 or cu_seqlens[-1] != packed or (lengths < 0).any():
        raise ValueError(f"{name}: cu_seqlens must rise from 0 to {packed}, the packed rows")
    for argument, (value, count) in counts.items():
        if (actual := int(count(lengths).sum())) != value:
            raise ValueError(f"{name}: {argument} is {value}, but the segments make {actual}")
