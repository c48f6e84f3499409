"""pool_norm_downsample: equals its definition for any packing, by every backend; neighbours never leak; registered correctly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import native, pool_norm_downsample
from step_kernels.pool_norm_downsample import _op, pool_norm_downsample_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

EPS = 1e-5
BACKENDS = backends_here("pool_norm_downsample")


def inputs(lengths: list[int], width: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(sum(lengths), width, generator=generator) + 1
    weight, bias = torch.randn(2, width, generator=generator)
    return hidden, cumulative(lengths), weight, bias


def rows(lengths: list[int]) -> int:
    return sum(length // 2 for length in lengths)


def test_pool_reference_is_avg_pool_and_layer_norm():
    hidden, cu_seqlens, weight, bias = (x.double() if x.is_floating_point() else x for x in inputs([7]))
    pooled = torch.nn.AvgPool1d(2, 2)(hidden.t()[None])[0].t()
    expected = torch.nn.functional.layer_norm(pooled, weight.shape, weight, bias, EPS)
    actual = pool_norm_downsample_reference(hidden, cu_seqlens, weight, bias, EPS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_it_has_its_fast_backends_here():
    assert {"cpp", "cuda"} <= set(BACKENDS)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9) | st.just(601), max_size=6), width=st.sampled_from([1, 7, 16, 40, 129, 1280]))
def test_equals_the_definition_in_float64(backend, lengths, width):
    hidden, cu_seqlens, weight, bias = inputs(lengths, width)
    with forced(backend):
        actual = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, rows(lengths))
    exact = pool_norm_downsample_reference(hidden.double(), cu_seqlens, weight.double(), bias.double(), EPS)
    assert_as_good_as_plain(actual, exact, pool_norm_downsample_reference(hidden, cu_seqlens, weight, bias, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(0, 9) | st.just(43), max_size=4), width=st.sampled_from([7, 40, 129, 512, 640, 1280, 1344]))
def test_cuda_equals_the_definition_in_every_dtype(dtype, lengths, width):
    hidden, cu_seqlens, weight, bias = inputs(lengths, width)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    with forced("cuda"):
        actual = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, rows(lengths))
    exact = pool_norm_downsample_reference(hidden.double(), cu_seqlens, weight.double(), bias.double(), EPS)
    assert_as_good_as_plain(actual, exact, pool_norm_downsample_reference(hidden, cu_seqlens, weight, bias, EPS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_far_from_zero_keeps_its_variance(backend):
    hidden, cu_seqlens, weight, bias = inputs([4], 64)
    hidden += 1000
    with forced(backend):
        actual = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, 2)
    exact = pool_norm_downsample_reference(hidden.double(), cu_seqlens, weight.double(), bias.double(), EPS)
    assert (actual.double() - exact).abs().max() < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_content_next_door_changes_nothing(backend):
    hidden, cu_seqlens, weight, bias = inputs([5, 4, 3])
    with forced(backend):
        before = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, 5)
        hidden[5:9] = 1e4
        after = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, 5)
    assert torch.equal(before[:2], after[:2]) and torch.equal(before[4:], after[4:])
    assert not torch.equal(before[2:4], after[2:4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_strides_are_taken(backend):
    hidden, cu_seqlens, weight, bias = inputs([6, 5], 48)
    with forced(backend):
        expected = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, 5)
        strided = pool_norm_downsample(hidden.t().contiguous().t(), cu_seqlens, weight, bias, EPS, 5)
    assert torch.equal(strided, expected)


def test_training_the_encoder_through_it_is_refused():
    hidden, cu_seqlens, weight, bias = inputs([4])
    with pytest.raises(ValueError, match="forward only"):
        pool_norm_downsample(hidden.requires_grad_(), cu_seqlens, weight, bias, EPS, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("bounds", "count", "named"),
    [
        ([0, 7, 11], 4, "rows is 4, but the segments make 5"),
        ([0, 7, 11], 6, "rows is 6"),
        ([0, 7, 13], 6, "rise from 0 to 11"),
        ([0, 13, 11], 5, "rise"),
    ],
)
def test_bounds_and_rows_that_contradict_each_other_are_refused(backend, bounds, count, named):
    hidden, _, weight, bias = inputs([7, 4])
    with forced(backend), pytest.raises(ValueError, match=named):
        pool_norm_downsample(hidden, torch.tensor(bounds, dtype=torch.int32), weight, bias, EPS, count)


@pytest.mark.parametrize(
    ("bounds", "count", "named"),
    [([0, 7, 11], 6, "5 outputs"), ([0, 7, 11], 4, "5 outputs"), ([0, 13], 6, "ends at 13"), ([0, 13, 11], 6, "must not fall")],
)
def test_the_library_reads_nothing_beside_its_tensors(bounds, count, named):
    hidden, _, weight, bias = inputs([7, 4])
    with pytest.raises(RuntimeError, match=named):
        out = torch.empty(count, 40)
        native.ops().pool_norm_downsample(hidden, torch.tensor(bounds, dtype=torch.int32), weight, bias, EPS, out)


@pytest.mark.parametrize("lengths", [[5, 4, 0, 1], []])
def test_registration(lengths):
    torch.library.opcheck(_op.registered, (*inputs(lengths), EPS, rows(lengths)))
