"""conv_downsample_gelu: equals its definition for any packing; neighbours never leak; gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import conv_downsample_gelu
from step_kernels.conv_downsample import conv_downsample_gelu_reference
from step_kernels.segments import cumulative

WIDTH, OUT = 12, 7
lengths = st.lists(st.integers(0, 9), max_size=6)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_rows(lengths: list[int]) -> int:
    return sum((length + 1) // 2 for length in lengths)


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


def test_other_content_next_door_changes_nothing():
    lengths = [5, 4, 3]
    x, cu_seqlens = random(12, WIDTH), cumulative(lengths)
    changed = x.clone()
    changed[5:9] = 1e4
    weight, bias = random(OUT, WIDTH, 3, seed=1), random(OUT, seed=2)
    before, after = (conv_downsample_gelu(part, cu_seqlens, weight, bias, conv_rows(lengths)) for part in (x, changed))
    same = [torch.equal(a, b) for a, b in zip(before.split((3, 2, 2)), after.split((3, 2, 2)), strict=True)]
    assert same == [True, False, True]
