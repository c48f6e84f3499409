"""Packing: which samples share a micro-batch, and which micro-batches a data-parallel rank gets. Pure functions of integers.

A window of samples is packed into as few bins of at most `budget` tokens as first-fit-decreasing needs; whole steps of bins are
given out, and what remains waits for the next window. Bins and steps are made alike in trained tokens: a step's loss is a mean
over its tokens, so a step of short text samples (mostly target) and one of long clips (few targets) would distort the mixture.
Within a step the bins are shared out over the ranks longest-processing-time first, every rank getting the same number, since a
step is as slow as its slowest rank and pipeline schedules want equal counts. The algorithms are those of `step_kernels.packing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from step_kernels.packing import balance_evenly, pack_evenly


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
    dealt = balance_evenly([sum(weights[i] for i in items) for items in going], count) if count else []
    return WindowPlan([[going[i] for i in step] for step in dealt], sorted(item for items in left for item in items))


def decoder_cost(lengths: Sequence[int], break_even: float) -> float:
    """Cost of a micro-batch's segments, in tokens' worth of matrix products.

    A layer multiplies each token with its weights (2 x weights FLOPs) and, for attention, with half of its segment on average
    (2 x width x length FLOPs). `break_even` is the length at which the two are equal: a layer's weights over its width.
    """
    return sum(length * (1 + length / break_even) for length in lengths)


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
