"""rms_norm: equals its definition in float64, forward and backward, for any shape, by every backend; half precision too."""

import importlib

import pytest
import torch
from step_kernels import registry, rms_norm
from step_kernels.rms_norm import _BLOCK, _op, rms_norm_reference
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

EPS = 1e-5
op = importlib.import_module("step_kernels.rms_norm")  # the module: the package has a function of that name
BACKENDS = backends_here("rms_norm")


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


def tensors(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(*shape, generator=generator).mul(3).to(dtype) for _ in range(2))
    return x.requires_grad_(), torch.randn(shape[-1], generator=generator).to(dtype).requires_grad_(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7, 1, 40), (3, 5, 64), (1, 8), (5, 1), (0, 1, 16), (2 * _BLOCK + 3, 1, 37), (_BLOCK, 129)])
def test_equals_the_float64_reference_with_gradients(shape, backend):
    with forced(backend):
        check(shape)


def results(function, x, weight, gradient) -> list[torch.Tensor]:
    out = function(x, weight, EPS)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), gradient)]


def check(shape):
    x, weight, gradient = tensors(shape)
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    exact = results(rms_norm_reference, *wide, gradient.double())
    plain = results(rms_norm_reference, x, weight, gradient)
    for each in zip(results(rms_norm, x, weight, gradient), exact, plain, strict=True):
        assert_as_good_as_plain(*each)


def test_gradients_pass_gradcheck():
    x, weight, _ = tensors((3, 2, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda *each: rms_norm(*each, EPS), (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_and_an_input_that_are_not_contiguous(backend):
    with forced(backend):
        check_turned()


def check_turned():
    x, weight, gradient = tensors((6, 4, 32))
    expected = results(rms_norm, x.transpose(0, 1).contiguous(), weight, gradient.transpose(0, 1).contiguous())
    for mine, theirs in zip(results(rms_norm, x.transpose(0, 1), weight, gradient.transpose(0, 1)), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_zeros_stay_zeros():
    x, weight, gradient = torch.zeros(2, 8, requires_grad=True), torch.ones(8), torch.ones(2, 8)
    out = rms_norm(x, weight, EPS)
    out.backward(gradient)
    assert torch.equal(out, torch.zeros(2, 8)) and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", registry.HALF)
def test_half_precision_is_computed_in_float32(dtype):
    x, weight, _ = tensors((9, 48), dtype)
    exact, plain = (rms_norm_reference(x.to(kind), weight.to(kind), EPS) for kind in (torch.float64, torch.float32))
    assert_as_good_as_plain(rms_norm(x, weight, EPS), exact, plain.to(dtype))


def test_a_row_does_not_depend_on_the_others():
    x, weight, _ = tensors((50, 256))
    whole = rms_norm(x, weight, EPS)
    assert all(torch.equal(rms_norm(x[i : i + 1], weight, EPS)[0], whole[i]) for i in (0, 17, 49))


def test_the_weights_gradient_does_not_depend_on_the_threads():
    x, weight, gradient = tensors((300, 64))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), gradient))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("x", "weight"), [((3, 4), (5,)), ((3, 0), (0,)), ((), ())])
def test_a_weight_that_does_not_fit_or_no_column_is_refused(x, weight):
    with pytest.raises(ValueError, match="one weight for each column"):
        rms_norm(torch.zeros(x), torch.ones(weight), EPS)


def test_a_weight_of_another_dtype_is_not_for_cpp(monkeypatch):
    x, weight = torch.randn(3, 4), torch.rand(4).bfloat16()
    monkeypatch.setattr(registry, "in_force", "cpp")
    with pytest.raises(RuntimeError, match=r"rms_norm by cpp does not take a weight in torch.bfloat16; add torch"):
        rms_norm(x, weight, EPS)
    monkeypatch.setattr(registry, "in_force", "")
    torch.testing.assert_close(rms_norm(x, weight, EPS), rms_norm_reference(x, weight.float(), EPS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_weight_gets_no_gradient_and_changes_none(backend, monkeypatch):
    x, weight, gradient = tensors((2 * _BLOCK + 3, 37))
    asked = []
    monkeypatch.setattr(op, "_backward_op", lambda *args, do=op._backward_op: asked.append(args[-1]) or do(*args))
    with forced(backend):
        (expected, _) = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), gradient)
        rms_norm(x, weight.detach(), EPS).backward(gradient)
    assert torch.equal(x.grad, expected) and asked == ([True, False] if backend == "cpp" else [])


@pytest.mark.parametrize("shape", [(7, 1, 40), (0, 16)])
def test_registration(shape):
    x, weight, _ = tensors(shape)
    torch.library.opcheck(_op.registered, (x, weight, EPS))
    torch.library.opcheck(_op.registered, (x, weight.detach(), EPS))
