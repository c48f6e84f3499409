"""gae_varlen equals the loop that defines it for any packing, by every backend; segments never see each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels.gae import _op, gae_varlen, gae_varlen_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

BACKENDS = backends_here("gae_varlen")


def inputs(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    return rewards, values, cumulative(lengths), torch.randn(len(lengths), generator=generator)


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


def test_it_has_its_fast_backends_here():
    assert {"cpp", "cuda"} <= set(BACKENDS)


def test_the_reference_by_hand():
    rewards, values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    bootstrap = torch.tensor([4.0, 8.0], dtype=torch.float64)
    advantages, returns = gae_varlen_reference(rewards, values, torch.tensor([0, 2, 3]), 0.5, 0.5, bootstrap)
    second = 2 + 0.5 * 4 - 1
    first = 1 + 0.5 * 1 - 0.5 + 0.25 * second
    assert advantages.tolist() == [first, second, 3 + 0.5 * 8 - 2]
    assert returns.tolist() == [first + 0.5, second + 1, 5 + 2]


def test_with_lambda_one_returns_are_discounted_sums_of_rewards():
    rewards, values, cu_seqlens, _ = double(*inputs([5]))
    _, returns = gae_varlen(rewards, values, cu_seqlens, 0.9, 1.0)
    expected = [sum(0.9 ** (u - t) * rewards[u] for u in range(t, 5)) for t in range(5)]
    torch.testing.assert_close(returns, torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5) | st.sampled_from([31, 129, 1023, 1024, 1025, 2500]), max_size=5),
    discount=st.sampled_from([(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.0, 0.5), (1.0, 0.0)]),
    cut=st.booleans(),
)
def test_equals_the_definition_in_float64(backend, lengths, discount, cut):
    rewards, values, cu_seqlens, bootstrap = inputs(lengths, seed=len(lengths))
    last = (bootstrap,) if cut else ()
    with forced(backend):
        actual = gae_varlen(rewards, values, cu_seqlens, *discount, *last)
    exact = gae_varlen_reference(*double(rewards, values, cu_seqlens), *discount, *double(*last))
    plain = gae_varlen_reference(rewards, values, cu_seqlens, *discount, *last)
    for ours, wanted, loop in zip(actual, exact, plain, strict=True):
        assert_as_good_as_plain(ours, wanted, loop)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(0, 9) | st.just(70), max_size=5))
def test_torch_equals_the_loop_to_the_last_digits_in_float64(lengths):
    arguments = double(*inputs(lengths))
    bootstrap = arguments.pop()
    actual = gae_varlen(*arguments, 0.99, 0.95, bootstrap)
    torch.testing.assert_close(actual, gae_varlen_reference(*arguments, 0.99, 0.95, bootstrap), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_change_nothing_whatever_they_hold(backend):
    rewards, values, cu_seqlens, bootstrap = inputs([3, 70, 5])
    with forced(backend):
        before = torch.stack(gae_varlen(rewards, values, cu_seqlens, 0.99, 0.95, bootstrap))
        for x in (rewards, values):
            x[:3], x[73:] = torch.inf, torch.nan
        after = torch.stack(gae_varlen(rewards, values, cu_seqlens, 0.99, 0.95, bootstrap))
        alone = torch.stack(gae_varlen(rewards[3:73], values[3:73], cumulative([70]), 0.99, 0.95, bootstrap[1:2]))
    assert torch.equal(before[:, 3:73], after[:, 3:73]) and torch.equal(before[:, 3:73], alone)


def test_threads_change_nothing():
    arguments, before = inputs([9000, 3, 20000, 0, 8000]), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with forced("cpp"):
                results.append(torch.stack(gae_varlen(*arguments[:3], 1.0, 0.95, arguments[3])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_taken(backend):
    rewards, values, cu_seqlens, _ = inputs([4, 3])
    pairs = torch.stack([rewards, values], 1)
    with forced(backend):
        expected = gae_varlen(rewards, values, cu_seqlens, 0.9, 0.8)
        assert torch.equal(torch.stack(gae_varlen(*pairs.unbind(1), cu_seqlens, 0.9, 0.8)), torch.stack(expected))


def test_what_does_not_fit_is_refused():
    rewards, values, cu_seqlens, bootstrap = inputs([4, 3])
    with pytest.raises(ValueError, match=r"rewards \[6\]"):
        gae_varlen(rewards[1:], values, cu_seqlens, 1.0, 1.0)
    with pytest.raises(ValueError, match="values .* must be alike"):
        gae_varlen(rewards, values.double(), cu_seqlens, 1.0, 1.0)
    with pytest.raises(ValueError, match="for each of 2 segments"):
        gae_varlen(rewards, values, cu_seqlens, 1.0, 1.0, bootstrap[1:])
    with pytest.raises(ValueError, match="forward only"):
        gae_varlen(rewards, values.requires_grad_(), cu_seqlens, 1.0, 1.0)


@pytest.mark.parametrize("lengths", [[5, 4, 0, 1], []])
@pytest.mark.parametrize("cut", [False, True])
def test_registration(lengths, cut):
    rewards, values, cu_seqlens, bootstrap = inputs(lengths)
    torch.library.opcheck(_op.registered, (rewards, values, cu_seqlens, bootstrap if cut else None, 0.9, 0.8))
