"""swiglu: equals its definition in float64, forward and backward, for any shape, by every backend; registered correctly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import swiglu
from step_kernels.swiglu import _op, swiglu_reference
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

BACKENDS = backends_here("swiglu")


def inputs(shape: tuple[int, ...], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + width)
    x = 4 * torch.randn(*shape, 2 * width, generator=generator)
    return x.requires_grad_(), torch.randn(*shape, width, generator=generator)


def results(function, x: torch.Tensor, gradient: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    x = x.detach().to(dtype).requires_grad_()
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out, x, gradient.to(dtype).expand_as(out))]


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=st.sampled_from([(0, 1), (1,), (3, 1), (2, 5), (70, 1)]),
    width=st.sampled_from([1, 7, 8, 16, 33, 768]),
)
def test_equals_the_definition_in_float64_with_its_gradient(backend, shape, width):
    x, gradient = inputs(shape, width)
    with forced(backend):
        actual = results(swiglu, x, gradient, torch.float32)
    exact = results(swiglu_reference, x, gradient, torch.float64)
    for each in zip(actual, exact, results(swiglu_reference, x, gradient, torch.float32), strict=True):
        assert_as_good_as_plain(*each)


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(swiglu, inputs((3, 2), 4)[0].detach().double().requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_far_from_zero_are_open_or_shut_and_nan_is_seen(backend):
    gate = torch.tensor([[-1e4], [-100.0], [0.0], [100.0], [1e4], [float("nan")]])
    x = torch.cat([gate, torch.full_like(gate, 2.0)], 1).requires_grad_()
    with forced(backend):
        out = swiglu(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    expected = torch.tensor([0.0, 0.0, 0.0, 200.0, 2e4])
    torch.testing.assert_close(out[:5, 0], expected)
    torch.testing.assert_close(gradient[:5], torch.tensor([[0.0, 0], [0, 0], [1, 0], [2, 100], [2, 1e4]]))
    assert out[5].isnan() and gradient[5].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates_are_as_in_torch(backend):
    edges = [-torch.inf, -3e38, -1e38, -1e36, -104.0, -89.0, -88.5, -87.5, 0.0, 87.5, 88.5, 1e36, 1e38, torch.inf, torch.nan]
    gate = torch.tensor(edges).repeat(3)[:, None]  # a row of one gate, and a whole vector of them
    for x in (torch.cat([gate, torch.ones_like(gate)], 1), torch.cat([gate.T, torch.ones_like(gate.T)], 1)):
        with forced(backend):
            actual = results(swiglu, x, torch.ones(1), torch.float32)
        exact = results(swiglu_reference, x, torch.ones(1), torch.float32)
        for mine, theirs in zip(actual, exact, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_strides_are_taken(backend):
    x, gradient = inputs((6, 4), 9)
    with forced(backend):
        expected = results(swiglu, x, gradient, torch.float32)
        turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        out = swiglu(turned)
        (strided,) = torch.autograd.grad(out, turned, gradient.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(out, expected[0]) and torch.equal(strided, expected[1])


@pytest.mark.parametrize("shape", [(2, 5), ()])
def test_an_odd_width_or_none_is_refused(shape):
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(shape))


@pytest.mark.parametrize("rows", [5, 0])
def test_registration(rows):
    torch.library.opcheck(_op.registered, (inputs((rows, 1), 12)[0],))
