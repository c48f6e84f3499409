"""rms_norm: equals its definition in float64, forward and backward, for any shape; half precision too."""

import pytest
import torch
from step_kernels import rms_norm
from step_kernels.rms_norm import rms_norm_reference

EPS = 1e-5


def tensors(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(*shape, generator=generator).mul(3).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.randn(shape[-1], generator=generator).to(dtype).requires_grad_(), gradient


@pytest.mark.parametrize("shape", [(7, 1, 40), (3, 5, 64), (1, 8), (0, 1, 16)])
def test_equals_the_float64_reference_with_gradients(shape):
    x, weight, gradient = tensors(shape)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm_reference(*exact, EPS)
    actual = rms_norm(x, weight, EPS)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for mine, theirs in zip(torch.autograd.grad(actual, (x, weight), gradient), wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_gradient_and_an_input_that_are_not_contiguous():
    x, weight, gradient = tensors((6, 4, 32))
    turned = rms_norm(x.transpose(0, 1), weight, EPS)
    expected = rms_norm_reference(x.transpose(0, 1), weight, EPS)
    for mine, theirs in zip(
        torch.autograd.grad(turned, (x, weight), gradient.transpose(0, 1)),
        torch.autograd.grad(expected, (x, weight), gradient.transpose(0, 1)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_zeros_stay_zeros():
    x, weight, gradient = torch.zeros(2, 8, requires_grad=True), torch.ones(8), torch.ones(2, 8)
    out = rms_norm(x, weight, EPS)
    out.backward(gradient)
    assert torch.equal(out, torch.zeros(2, 8)) and x.grad.isfinite().all()


def test_bfloat16_is_computed_in_float32():
    x, weight, _ = tensors((9, 48), torch.bfloat16)
    expected = rms_norm_reference(x.float(), weight.float(), EPS)
    torch.testing.assert_close(rms_norm(x, weight, EPS).float(), expected, rtol=2**-7, atol=2**-8)


def test_a_row_does_not_depend_on_the_others():
    x, weight, _ = tensors((50, 256))
    whole = rms_norm(x, weight, EPS)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, EPS)[0], whole[i]) for i in (0, 17, 49))
