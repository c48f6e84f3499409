"""Who takes part: the backends of an op that run here, eager torch and torch.compile of the same function."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch

from step_kernels import registry
from step_kernels.bench.harness import Absent, Contestant, Work


def ours(op: str, work: Work, device: torch.device) -> list[Contestant]:
    """A contestant for every backend of our own that runs on `device`, the preferred one first; torch is the eager one's."""
    backends = {name: why for name, why in registry.backends_of(op, device).items() if name not in registry.LIBRARIES}
    live = [name for name, reason in backends.items() if not reason and name != "torch"]
    if not live:
        why = "; ".join(reason for reason in backends.values() if reason) or "no backend but torch is written"
        return [Contestant("ours", _absent(f"{op}: {why}"))]
    return [Contestant(f"ours ({name})", lambda: work, within=partial(registry.forced, name)) for name in live]


def backend(title: str, op: str, name: str, work: Work, device: torch.device) -> Contestant:
    """One backend of an op by its name; absent where it cannot run, or refuses the work."""

    def prepare() -> Work:
        if reason := registry.backends_of(op, device)[name]:
            raise Absent(reason)
        try:
            work()
        except (RuntimeError, ValueError, AssertionError) as error:
            raise Absent(f"fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
        return work

    return Contestant(title, prepare, within=partial(registry.forced, name))


def eager(work: Work, limit: float | None, **more) -> Contestant:
    """Plain torch."""
    return Contestant("eager", lambda: work, limit, **more)


def compiled(
    function: Callable, arguments: Sequence, limit: float | None, wrap: Callable[[Callable], Work] | None = None, **more
) -> Contestant:
    """`torch.compile` of a function of tensors and numbers; `wrap(function)` gives the work where that is not a mere call."""

    def prepare() -> Work:
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        work = wrap(fast) if wrap else lambda: fast(*arguments)
        try:
            work()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise Absent(f"torch.compile: {str(error).splitlines()[0]}") from error
        return work

    return Contestant("torch.compile", prepare, limit, **more)


def library(name: str, module: str, make: Callable[[], Work], device: torch.device, limit: float | None = None) -> Contestant:
    """A library's kernel, on a GPU machine where the library is installed."""

    def prepare() -> Work:
        if device.type != "cuda":
            raise Absent("runs on a GPU only")
        if find_spec(module) is None:
            raise Absent(f"{module} is not installed")
        return make()

    return Contestant(name, prepare, limit)


def forward_only(function: Work) -> Work:
    """The work of a forward pass that keeps nothing for backward."""

    def work():
        with torch.no_grad():
            return function()

    return work


def forward_backward(function: Work, leaves: Sequence[torch.Tensor], output_gradient: torch.Tensor) -> Work:
    """The work of a forward and a backward pass: the output and the gradients of the leaves."""

    def work():
        out = function()
        return [out, *torch.autograd.grad(out, leaves, output_gradient)]

    return work


def by(backend: str, work: Callable) -> Callable:
    """The same work with every op by one backend; it is asked for at every call of an op, so nothing is chosen beforehand."""

    def run(*arguments):
        with registry.forced(backend):
            return work(*arguments)

    return run


def _absent(reason: str) -> Callable[[], Work]:
    def prepare() -> Work:
        raise Absent(reason)

    return prepare
