"""rope_qk: equals its definition in float64, forward and backward, by every backend; takes slices of a fused projection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import rope_qk
from step_kernels.rope_qk import _op, rope_qk_reference
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

BACKENDS = backends_here("rope_qk")


def inputs(tokens: int, heads: int, groups: int, dim: int) -> list[torch.Tensor]:
    """Query, key, cos and sin (of no angle, so that a mixed-up half shows), and the results' gradients."""
    generator = torch.Generator().manual_seed(tokens + heads + dim)
    shapes = ((tokens, heads, dim), (tokens, groups, dim), (tokens, dim), (tokens, dim))
    return [torch.randn(*shape, generator=generator) for shape in (*shapes, *shapes[:2])]


def results(function, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    query, key, cos, sin, *gradients = (each.to(dtype) for each in tensors)
    out = function(query.requires_grad_(), key.requires_grad_(), cos, sin)
    return [*(each.detach() for each in out), *torch.autograd.grad(out, (query, key), gradients)]


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    tokens=st.sampled_from([0, 1, 5, 130]),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]),
    dim=st.sampled_from([2, 6, 32, 40, 64, 128]),
)
def test_equals_the_definition_in_float64_with_its_gradients(backend, tokens, heads, dim):
    tensors = inputs(tokens, *heads, dim)
    with forced(backend):
        actual = results(rope_qk, tensors, torch.float32)
    exact, plain = (results(rope_qk_reference, tensors, dtype) for dtype in (torch.float64, torch.float32))
    for each in zip(actual, exact, plain, strict=True):
        assert_as_good_as_plain(*each)


def test_gradients_pass_gradcheck():
    query, key, cos, sin, *_ = (each.double() for each in inputs(3, 4, 2, 6))
    assert torch.autograd.gradcheck(lambda *each: rope_qk(*each, cos, sin), (query.requires_grad_(), key.requires_grad_()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_fused_projection_are_taken(backend):
    query, key, cos, sin, *_ = inputs(7, 4, 2, 16)
    fused = torch.cat([query, key], 1)
    with forced(backend):
        expected = rope_qk(query, key, cos, sin)
        sliced = rope_qk(fused[:, :4], fused[:, 4:], cos, sin)
        turned = rope_qk(*(each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key)), cos, sin)
    assert all(torch.equal(*each) for each in zip(expected, sliced, strict=True))
    assert all(torch.equal(*each) for each in zip(expected, turned, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_token_changes_nothing(backend):
    query, key, cos, sin, *_ = inputs(7, 4, 2, 16)
    with forced(backend):
        before = rope_qk(query, key, cos, sin)
        query[3], key[3] = 1e4, float("nan")
        after = rope_qk(query, key, cos, sin)
    kept = torch.arange(7) != 3
    assert all(torch.equal(one[kept], two[kept]) and not torch.equal(one, two) for one, two in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(6, 4, 16)}, "same tokens"),
        ({0: torch.zeros(7, 4, 15), 1: torch.zeros(7, 2, 15)}, "even dim"),
        ({0: torch.zeros(())}, "same tokens"),
        ({2: torch.zeros(7, 8)}, "one row a token"),
        ({1: torch.zeros(7, 2, 16, dtype=torch.bfloat16)}, "query is torch.float32, but key torch.bfloat16, .*cast them"),
        ({3: torch.zeros(7, 16, dtype=torch.float64)}, "sin torch.float64; cast them"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_and_dtypes_that_do_not_fit_are_refused(change, message, backend):
    arguments = dict(enumerate(inputs(7, 4, 2, 16)[:4])) | change
    with forced(backend), pytest.raises(ValueError, match=message):
        rope_qk(*arguments.values())


@pytest.mark.parametrize("tokens", [5, 0])
def test_registration(tokens):
    query, key, cos, sin, *_ = inputs(tokens, 2, 1, 8)
    torch.library.opcheck(_op.registered, (query.requires_grad_(), key.requires_grad_(), cos, sin, False))
