"""pool_norm_downsample and conv_downsample_gelu: equal their definitions for any packing; neighbours never leak; gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import conv_downsample_gelu, pool_norm_downsample
from step_kernels.conv_downsample import conv_downsample_gelu_reference
from step_kernels.pool_norm_downsample import pool_norm_downsample_reference
from step_kernels.segments import cumulative

WIDTH, OUT, EPS = 12, 7, 1e-5
lengths = st.lists(st.integers(0, 9), max_size=6)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pooled_rows(lengths: list[int]) -> int:
    return sum(length // 2 for length in lengths)


def conv_rows(lengths: list[int]) -> int:
    return sum((length + 1) // 2 for length in lengths)


@given(lengths)
def test_pool_equals_float64_reference(lengths):
    hidden, weight, bias = random(sum(lengths), WIDTH), random(WIDTH, seed=1), random(WIDTH, seed=2)
    cu_seqlens = cumulative(lengths)
    expected = pool_norm_downsample_reference(hidden.double(), cu_seqlens, weight.double(), bias.double(), EPS)
    actual = pool_norm_downsample(hidden, cu_seqlens, weight, bias, EPS, pooled_rows(lengths))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_pool_reference_is_avg_pool_and_layer_norm():
    hidden = random(7, WIDTH, dtype=torch.float64)
    weight, bias = random(2, WIDTH, seed=1, dtype=torch.float64)
    pooled = torch.nn.AvgPool1d(2, 2)(hidden.t()[None])[0].t()
    expected = torch.nn.functional.layer_norm(pooled, (WIDTH,), weight, bias, EPS)
    actual = pool_norm_downsample_reference(hidden, cumulative([7]), weight, bias, EPS)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_pool_refuses_to_train_the_encoder():
    with pytest.raises(ValueError, match="forward only"):
        pool_norm_downsample(random(4, WIDTH).requires_grad_(), cumulative([4]), torch.ones(WIDTH), torch.zeros(WIDTH), EPS, 2)


@given(lengths)
def test_conv_equals_conv1d_per_segment_in_float64(lengths):
    x, weight, bias = random(sum(lengths), WIDTH), random(OUT, WIDTH, 3, seed=1), random(OUT, seed=2)
    expected = conv_downsample_gelu_reference(x.double(), cumulative(lengths), weight.double(), bias.double())
    actual = conv_downsample_gelu(x, cumulative(lengths), weight, bias, conv_rows(lengths))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_conv_gradients_equal_the_reference():
    lengths = [3, 0, 1, 6, 2]
    arguments = [random(sum(lengths), 5), random(4, 5, 3, seed=1), random(4, seed=2)]
    ours, theirs = ([a.double().requires_grad_() for a in arguments] for _ in range(2))
    cotangent = random(conv_rows(lengths), 4, seed=3).double()
    conv_downsample_gelu(ours[0], cumulative(lengths), *ours[1:], conv_rows(lengths)).backward(cotangent)
    conv_downsample_gelu_reference(theirs[0], cumulative(lengths), *theirs[1:]).backward(cotangent)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", ["pool", "conv"])
def test_other_content_next_door_changes_nothing(op):
    lengths = [5, 4, 3]
    x, cu_seqlens = random(12, WIDTH), cumulative(lengths)
    changed = x.clone()
    changed[5:9] = 1e4
    if op == "pool":
        before, after = (
            pool_norm_downsample(part, cu_seqlens, torch.ones(WIDTH), torch.zeros(WIDTH), EPS, pooled_rows(lengths))
            for part in (x, changed)
        )
        segments = (2, 2, 1)
    else:
        weight, bias = random(OUT, WIDTH, 3, seed=1), random(OUT, seed=2)
        before, after = (conv_downsample_gelu(part, cu_seqlens, weight, bias, conv_rows(lengths)) for part in (x, changed))
        segments = (3, 2, 2)
    same = [torch.equal(a, b) for a, b in zip(before.split(segments), after.split(segments), strict=True)]
    assert same == [True, False, True]
