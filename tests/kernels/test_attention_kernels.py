"""Packed attention, bidirectional and causal: equals its definition in float64, gradients included; segments never mix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import audio_attention_varlen, causal_attention_varlen
from step_kernels.audio_attention import audio_attention_varlen_reference
from step_kernels.causal_attention import causal_attention_varlen_reference
from step_kernels.segments import cumulative

DIM = 8
lengths = st.lists(st.integers(0, 40), max_size=6)


def qkv(rows: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, count, DIM, generator=generator, dtype=dtype) for count in (heads, kv_heads, kv_heads)]


@given(lengths, st.data())
def test_audio_equals_float64_reference(lengths, data):
    valid = [data.draw(st.integers(min(1, length), length)) for length in lengths]
    inputs = qkv(sum(lengths), 3, 3)
    expected = audio_attention_varlen_reference(*(x.double() for x in inputs), lengths, valid, DIM**-0.5)
    actual = audio_attention_varlen(*inputs, cumulative(lengths), lengths, valid)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@given(lengths)
def test_causal_equals_float64_reference(lengths):
    inputs = qkv(sum(lengths), 6, 2)
    expected = causal_attention_varlen_reference(*(x.double() for x in inputs), lengths, DIM**-0.5)
    actual = causal_attention_varlen(*inputs, cumulative(lengths), lengths)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_causal_gradients_equal_the_reference(heads, kv_heads):
    lengths = [5, 1, 0, 5, 5, 12]
    inputs = qkv(sum(lengths), heads, kv_heads, torch.float64)
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    cotangent = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    causal_attention_varlen(*ours, cumulative(lengths), lengths, scale=0.4).backward(cotangent)
    causal_attention_varlen_reference(*theirs, lengths, 0.4).backward(cotangent)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("op", [audio_attention_varlen, causal_attention_varlen])
def test_other_content_next_door_changes_nothing(op):
    # Two of one length side by side share a batched call; the third has its own.
    lengths = [6, 6, 9]
    inputs = qkv(21, 2, 2)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[6:12] = 50.0
    before, after = (op(*part, cumulative(lengths), lengths).split(lengths) for part in (inputs, changed))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_causal_ignores_the_future():
    inputs = qkv(10, 2, 2)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[7:] = 50.0
    before, after = (causal_attention_varlen(*part, cumulative([10]), [10]) for part in (inputs, changed))
    assert torch.equal(before[:7], after[:7]) and not torch.equal(before[7:], after[7:])


@pytest.mark.parametrize("op", [audio_attention_varlen, causal_attention_varlen])
def test_lengths_that_do_not_fit_are_refused(op):
    with pytest.raises(ValueError, match="hold 9 rows, but the packed tensor has 10"):
        op(*qkv(10, 2, 2), cumulative([4, 5]), [4, 5])
    with pytest.raises(ValueError, match="cu_seqlens describes 1 segments, the host lengths 2"):
        op(*qkv(10, 2, 2), cumulative([10]), [4, 6])


def test_a_segment_without_a_valid_frame_is_refused():
    with pytest.raises(ValueError, match="needs 1..length valid frames"):
        audio_attention_varlen(*qkv(4, 2, 2), cumulative([4]), [4], [0])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        causal_attention_varlen(*qkv(4, 3, 2), cumulative([4]), [4])
