"""Packing: which samples share a micro-batch, and which micro-batches a data-parallel rank gets. Pure functions of integers.

A window of samples is packed into as few bins of at most `budget` tokens as first-fit-decreasing needs; whole steps of bins are
given out, and what remains waits for the next window. Bins and steps are made alike in trained tokens: a step's loss is a mean
over its tokens, so a step of short text samples (mostly target) and one of long clips (few targets) would distort the mixture.
Within a step the bins are shared out over the ranks longest-processing-time first, every rank getting the same number, since a
step is as slow as its slowest rank and pipeline schedules want equal counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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
    count = len(first_fit_decreasing(lengths, budget))
    bins: list[list[int]] = [[] for _ in range(count)]
    room, loads = [budget] * count, [0] * count
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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


@dataclass(frozen=True)
class WindowPlan:
    """What becomes of a window: `steps[s][b]` are the item indices of a micro-batch, `waiting` the items of no step."""

    steps: list[list[list[int]]]
    waiting: list[int]


def plan_window(
    lengths: Sequence[int], ages: Sequence[int], weights: Sequence[int], budget: int, bins_per_step: int
) -> WindowPlan:
    """Pack a window and cut it into whole steps.

    Bins that hold the oldest items go first, then the fullest, so no item waits for ever and what waits is the least full.

    Args:
        lengths: tokens of each item.
        ages: the window in which each item was drawn; smaller is older.
        weights: trained tokens of each item.
    """
    bins = pack_evenly(lengths, weights, budget)
    bins.sort(key=lambda items: (min(ages[i] for i in items), -sum(lengths[i] for i in items), items[0]))
    count = len(bins) // bins_per_step
    going, left = bins[: count * bins_per_step], bins[count * bins_per_step :]
    dealt = longest_first([sum(weights[i] for i in items) for items in going], count) if count else []
    return WindowPlan([[going[i] for i in step] for step in dealt], sorted(item for items in left for item in items))


def longest_first(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Share items out over ranks, the same number each: dearest first, each to the rank with least so far that has a place.

    Raises:
        ValueError: the items cannot be shared out evenly.
    """
    if len(costs) % ranks:
        raise ValueError(f"{len(costs)} items cannot be shared out evenly over {ranks} ranks; make it a multiple")
    places = len(costs) // ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < places), key=lambda r: (loads[r], r))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return shares


def decoder_cost(lengths: Sequence[int], break_even: float) -> float:
    """Cost of a micro-batch's segments, in tokens' worth of matrix products.

    A layer multiplies each token with its weights (2 x weights FLOPs) and, for attention, with half of its segment on average
    (2 x width x length FLOPs). `break_even` is the length at which the two are equal: a layer's weights over its width.
    """
    return sum(length * (1 + length / break_even) for length in lengths)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
