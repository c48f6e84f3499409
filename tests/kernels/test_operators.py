"""An op is called at once where nobody looks, and is an operator for torch where somebody does; both compute the same."""

import pytest
import torch
from step_kernels.operators import operator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

calls = []


@operator("step_test::scaled")
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    calls.append(x)
    return x * factor


@scaled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    ctx.factor = inputs[1]


scaled.register_autograd(lambda ctx, gradient: (scaled(gradient, ctx.factor), None), setup_context=_keep)


@operator("step_test::doubled_", mutates=("x",))
def doubled_(x: torch.Tensor) -> None:
    x.data.mul_(2)  # as a kernel writes, past autograd


class Seen(TorchDispatchMode):
    """Names of the operators that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


class Other(torch.Tensor):
    pass


def test_registration():
    torch.library.opcheck(scaled.registered, (torch.randn(3, requires_grad=True), 2.0))
    torch.library.opcheck(doubled_.registered, (torch.randn(3),))


def test_a_plain_call_goes_past_the_dispatcher_with_the_same_results_and_gradients(monkeypatch):
    x = torch.randn(3, requires_grad=True)
    wanted = scaled.registered(x, 2.0)
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    monkeypatch.setattr(scaled, "registered", None)
    out = scaled(x, 2.0)
    assert torch.equal(out, wanted) and type(out.grad_fn).__name__ == "scaledBackward"
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], gradient)
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad
    with torch.inference_mode():
        doubled_(torch.ones(2))


def test_who_looks_at_operators_sees_one():
    with Seen() as seen:
        scaled(torch.ones(2), 2.0)
    assert "step_test::scaled" in seen.names
    calls.clear()
    with FakeTensorMode():
        assert scaled(torch.empty(4), 2.0).shape == (4,)
    assert scaled(torch.empty(4, device="meta"), 2.0).is_meta and not calls
    assert torch.equal(scaled(torch.ones(2).as_subclass(Other), 2.0), torch.full((2,), 2.0))
    compiled = torch.compile(lambda x: scaled(x, 3.0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))


def test_a_profile_shows_its_name():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled(torch.ones(2), 2.0)
    assert "step_test::scaled" in {event.name for event in profile.events()}


def test_what_is_overwritten_cannot_be_differentiated():
    x = torch.ones(2, requires_grad=True)
    y = x * 1
    squared = y**2
    with torch.no_grad():
        doubled_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
