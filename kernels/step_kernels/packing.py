"""Packing items into bins and sharing them out over workers: in C++ (`csrc/host`), each beside its definition in Python.

Both give the same plans, item for item, whatever the machine: a run that is resumed must find the plans that it left.

    first_fit_decreasing   O(n log n), by a tree of the bins' room
    pack_evenly            O(n x bins): the least load among the bins with room is looked up by going through them
    balance, balance_evenly     O(n log n), by a heap of the workers' loads
"""

import heapq
from collections.abc import Sequence
from functools import cache


@cache
def _host():
    try:
        from step_kernels import _host as module
    except ImportError as error:
        raise RuntimeError(
            f"step_kernels was installed without its host module ({error}); with a C++ compiler and pybind11, "
            "`pip install --no-build-isolation -e .`"
        ) from error
    return module


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into bins: longest first, each into the first bin with room.

    Args:
        lengths: tokens of each item, each between 1 and `budget`.

    Returns:
        Bins of item indices; every index exactly once, no bin above `budget`. At most 11/9 of the fewest bins possible, plus one
        (Johnson, 1973).

    Raises:
        ValueError: an item that fits no bin.
    """
    return _host().first_fit_decreasing(lengths, budget)


def pack_evenly(lengths: Sequence[int], weights: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into about as many bins as first-fit-decreasing needs, with weights as even as that allows.

    Longest first, each item goes to the bin with room that has the least weight; one that finds no room opens a bin.

    Args:
        lengths: tokens of each item, each between 1 and `budget`.
        weights: trained tokens of each item.

    Returns:
        Bins of item indices; every index exactly once, no bin empty or above `budget`.

    Raises:
        ValueError: an item that fits no bin.
    """
    return _host().pack_evenly(lengths, weights, budget)


def balance(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Share out work: the longest item first, each to the worker with the least to do (never worse than 4/3 of the best).

    Returns:
        Indices into `lengths` for every worker, longest first. Equal lengths keep their order, so every rank computes the same.

    Raises:
        ValueError: no worker.
    """
    return _host().balance(lengths, workers)


def balance_evenly(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Share items out, the same number each: dearest first, each to the worker with least so far that has a place.

    Raises:
        ValueError: the items cannot be shared out evenly.
    """
    return _host().balance_evenly(costs, workers)


def first_fit_decreasing_reference(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Define `first_fit_decreasing`."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in _falling(lengths):
        length = lengths[item]
        if not 1 <= length <= budget:
            raise ValueError(f"item {item} has {length} tokens; a bin holds 1 to {budget}")
        for index, free in enumerate(room):
            if length <= free:
                bins[index].append(item)
                room[index] -= length
                break
        else:
            bins.append([item])
            room.append(budget - length)
    return bins


def pack_evenly_reference(lengths: Sequence[int], weights: Sequence[int], budget: int) -> list[list[int]]:
    """Define `pack_evenly`."""
    count = len(first_fit_decreasing_reference(lengths, budget))
    bins: list[list[int]] = [[] for _ in range(count)]
    room, loads = [budget] * count, [0] * count
    for item in _falling(lengths):
        fits = [b for b, free in enumerate(room) if free >= lengths[item]]
        if not fits:
            bins.append([])
            room.append(budget)
            loads.append(0)
            fits = [len(bins) - 1]
        chosen = min(fits, key=lambda b: (loads[b], -room[b], b))
        bins[chosen].append(item)
        room[chosen] -= lengths[item]
        loads[chosen] += weights[item]
    return [items for items in bins if items]


def balance_reference(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Define `balance`."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0, worker) for worker in range(workers)]
    for item in _falling(lengths):
        load, worker = heapq.heappop(loads)
        shares[worker].append(item)
        heapq.heappush(loads, (load + lengths[item], worker))
    return shares


def balance_evenly_reference(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Define `balance_evenly`."""
    if len(costs) % workers:
        raise ValueError(f"{len(costs)} items cannot be shared out evenly over {workers} ranks; make it a multiple")
    places = len(costs) // workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0.0] * workers
    for item in _falling(costs):
        worker = min((w for w in range(workers) if len(shares[w]) < places), key=lambda w: (loads[w], w))
        shares[worker].append(item)
        loads[worker] += costs[item]
    return shares


def _falling(values: Sequence[float]) -> list[int]:
    """Indices by falling value, equal ones in their order."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))
