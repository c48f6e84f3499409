"""Packing in C++: the same plans as the definition in Python, item for item, and the same refusals."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import packing

BUDGET = 50
lengths = st.lists(st.integers(1, BUDGET), max_size=120)


@settings(max_examples=200)
@given(lengths, st.integers(BUDGET, 3 * BUDGET))
def test_first_fit_decreasing(items, budget):
    assert packing.first_fit_decreasing(items, budget) == packing.first_fit_decreasing_reference(items, budget)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, BUDGET), st.integers(0, 9)), max_size=120))
def test_pack_evenly(items):
    sizes, weights = [length for length, _ in items], [weight for _, weight in items]
    assert packing.pack_evenly(sizes, weights, BUDGET) == packing.pack_evenly_reference(sizes, weights, BUDGET)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 2**40), max_size=120), st.integers(1, 12))
def test_balance(items, workers):
    assert packing.balance(items, workers) == packing.balance_reference(items, workers)


# Sums of such fractions depend on the order of addition: the same order is asked for, not nearly the same loads.
costs = st.integers(0, 40).map(lambda i: i / 10) | st.floats(0, 1e12, allow_nan=False) | st.integers(0, 5)


@settings(max_examples=200)
@given(st.lists(costs, max_size=60), st.integers(1, 12))
def test_balance_evenly(items, workers):
    items = items[: len(items) // workers * workers]
    assert packing.balance_evenly(items, workers) == packing.balance_evenly_reference(items, workers)


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("first_fit_decreasing", ([3, 9], 8), "item 1 has 9 tokens; a bin holds 1 to 8"),
        ("first_fit_decreasing", ([3, 0], 8), "item 1 has 0 tokens; a bin holds 1 to 8"),
        ("pack_evenly", ([9], [1], 8), "item 0 has 9 tokens; a bin holds 1 to 8"),
        ("balance_evenly", ([1.0, 2.0, 3.0], 2), "3 items cannot be shared out evenly over 2 ranks; make it a multiple"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_same_words(name, arguments, message, suffix):
    with pytest.raises(ValueError, match=message):
        getattr(packing, name + suffix)(*arguments)


@pytest.mark.parametrize("function", [packing.balance, packing.balance_evenly])
def test_no_worker_is_refused(function):
    with pytest.raises(ValueError, match="0 workers"):
        function([1, 2], 0)


def test_a_fraction_is_no_length():
    with pytest.raises(TypeError):
        packing.first_fit_decreasing([1.5], 8)


def test_an_installation_without_the_module_says_so():
    code = "import sys; sys.modules['step_kernels._host'] = None; from step_kernels import packing; packing.balance([1], 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RuntimeError: step_kernels was installed without its host module" in done.stderr
