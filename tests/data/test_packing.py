"""Packing: nothing lost, nothing doubled, no budget exceeded, ranks balanced."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_kernels.packing import balance_evenly, first_fit_decreasing, pack_evenly

from step_megatron.data.packing import (
    decoder_cost,
    plan_window,
    round_up,
)

BUDGET = 64
items = st.lists(st.tuples(st.integers(1, BUDGET), st.integers(0, 30)), max_size=40)


def split(made: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [length for length, _ in made], [weight for _, weight in made]


@given(items)
def test_every_item_once_and_no_bin_over_budget(made):
    lengths, weights = split(made)
    for bins in (first_fit_decreasing(lengths, BUDGET), pack_evenly(lengths, weights, BUDGET)):
        assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
        assert all(bins) and all(sum(lengths[i] for i in items) <= BUDGET for items in bins)


def fewest_bins(lengths: list[int], budget: int) -> int:
    """By trying everything: for each subset of items, the fewest bins and the least room used in the last."""
    best = {0: (1, 0)}
    for subset in range(1, 1 << len(lengths)):
        best[subset] = min(
            (count, used + lengths[i]) if used + lengths[i] <= budget else (count + 1, lengths[i])
            for i in range(len(lengths))
            if subset >> i & 1
            for count, used in [best[subset ^ 1 << i]]
        )
    return best[(1 << len(lengths)) - 1][0]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_first_fit_decreasing_is_near_the_fewest_bins(lengths):
    bins = first_fit_decreasing(lengths, 20)
    assert len(bins) <= 11 / 9 * fewest_bins(lengths, 20) + 6 / 9  # Dosa, 2007: the tight bound


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]


def test_even_packing_evens_out_trained_tokens():
    """Clips (long, few targets) and sums (short, mostly targets): bins of one kind only would distort the mixture."""
    draw = random.Random(0)
    made = [(draw.randint(100, 400), 20) for _ in range(60)] + [(draw.randint(20, 40), 20) for _ in range(60)]
    lengths, weights = split(made)

    def spread(bins: list[list[int]]) -> float:
        loads = np.array([sum(weights[i] for i in items) for items in bins])
        return loads.std() / loads.mean()

    plain, even = first_fit_decreasing(lengths, 2048), pack_evenly(lengths, weights, 2048)
    assert len(even) == len(plain)
    assert spread(even) < 0.5 * spread(plain)


@given(items, st.integers(1, 4), st.integers(0, 3))
def test_window_gives_whole_steps_and_keeps_the_rest(made, bins_per_step, seed):
    lengths, weights = split(made)
    ages = [random.Random(seed + i).randint(0, 2) for i in range(len(made))]
    plan = plan_window(lengths, ages, weights, BUDGET, bins_per_step)
    planned = [item for step in plan.steps for bin in step for item in bin]
    assert sorted(planned + plan.waiting) == list(range(len(made)))
    assert all(len(step) == bins_per_step for step in plan.steps)
    waiting_bins = len(pack_evenly(lengths, weights, BUDGET)) - bins_per_step * len(plan.steps)
    assert 0 <= waiting_bins < bins_per_step
    if plan.steps:
        assert min(ages) in {ages[item] for item in planned}, "the oldest goes first"
        oldest_waiting = min((ages[item] for item in plan.waiting), default=3)
        assert all(min(ages[item] for item in bin) <= oldest_waiting for step in plan.steps for bin in step)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.integers(1, 4))
def test_ranks_get_the_same_number_and_everything_is_given_out(costs, ranks):
    costs = costs * ranks
    shares = balance_evenly(costs, ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // ranks}


def test_balance_evenly_balances():
    shares = balance_evenly([9, 7, 6, 5, 4, 1], 2)
    assert shares == [[0, 3, 5], [1, 2, 4]] or sorted(sum([9, 7, 6, 5, 4, 1][i] for i in share) for share in shares) == [15, 17]
    draw = random.Random(1)
    costs = [draw.random() + 0.2 for _ in range(64)]
    loads = [sum(costs[i] for i in share) for share in balance_evenly(costs, 4)]
    in_order = [sum(costs[start::4]) for start in range(4)]
    assert max(loads) / min(loads) < 1.05 < max(in_order) / min(in_order)


def test_uneven_shares_are_refused():
    with pytest.raises(ValueError, match="3 items cannot be shared out evenly over 2 ranks"):
        balance_evenly([1, 2, 3], 2)


def test_item_that_fits_no_bin_is_refused():
    for length in (0, 65):
        with pytest.raises(ValueError, match=f"item 1 has {length} tokens"):
            first_fit_decreasing([3, length], BUDGET)


def test_decoder_cost_counts_weights_and_half_of_the_segment():
    """Against the operations of one layer, counted term by term, for two lengths of segment."""
    width, ffn, groups, heads = 64, 160, 2, 4
    weights = width * width * (2 + 2 * groups // heads) + 3 * width * ffn

    def operations(length: int) -> float:
        attention = sum(2 * 2 * width * (position + 0.5) for position in range(length))
        return 2 * weights * length + attention

    cost = [decoder_cost([length], weights / width) for length in (100, 1000)]
    assert cost[1] / cost[0] == pytest.approx(operations(1000) / operations(100), rel=1e-9)
    assert decoder_cost([3, 4], float("inf")) == 7


@given(st.integers(0, 100), st.integers(1, 9))
def test_round_up(length, multiple):
    assert round_up(length, multiple) % multiple == 0 and 0 <= round_up(length, multiple) - length < multiple
