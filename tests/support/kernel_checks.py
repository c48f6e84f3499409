"""How an op of `step_kernels` is held against its definition: the backends that run here, and how far each may be off.

An op is judged by its distance from the definition in float64, relative to that of the definition computed plainly in the op's
own dtype: a kernel may be somewhat worse than the plain way (it sums in another order), not arbitrarily.
"""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
from step_kernels import backends_of, registry
from support.cuda_emulation import emulated

# Times the plain low-precision error, and a floor relative to the largest value, for cases where the plain error happens to be 0.
TOLERANCE = {
    torch.float32: (4.0, 2e-6),
    torch.bfloat16: (2.0, 4e-3),
    torch.float16: (2.0, 5e-4),
}


def backends_here(op: str) -> list[str]:
    """Backends of an op that run on this machine's CPU: Triton under its interpreter, CUDA under the emulation."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), emulated():
        return [name for name, reason in backends_of(op, "cpu").items() if not reason]


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    """Run ops by this backend alone; what an op does not have in it goes to torch."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(registry.forced(f"{backend},torch"))
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}))
        if backend == "cuda":
            stack.enter_context(emulated())
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch have so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_as_good_as_plain(actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Hold a result against the definition in float64 (`exact`) and in the result's dtype (`plain`)."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype
    if not exact.numel():
        return
    times, floor = TOLERANCE[actual.dtype]
    error, allowed = (actual.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    limit = torch.maximum(times * allowed, floor * exact.abs().max())
    assert error <= limit, f"off by {error:.2e}, the plain way by {allowed:.2e}, allowed {limit:.2e}"
