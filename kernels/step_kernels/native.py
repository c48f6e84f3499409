"""The compiled library: C++ kernels for the CPU, CUDA kernels where the build had nvcc; loaded once, on first use.

`torch.ops.step_native.*` write into tensors that the caller allocates; the ops of this package wrap them.
"""

import functools
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "_native.so"
_ISA = ("portable", "avx2", "avx512")


@functools.cache
def load_error() -> str:
    """Why the library cannot be used; empty when it is loaded."""
    if not _LIBRARY.exists():
        return (
            "step_kernels was installed without its native library; with a C++ compiler, `pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load ({str(error).splitlines()[0]}); install again against this torch"
    return ""


def ops():
    """The library's ops.

    Raises:
        RuntimeError: it cannot be loaded; says why.
    """
    if reason := load_error():
        raise RuntimeError(reason)
    return torch.ops.step_native


def describe() -> dict[str, str | bool]:
    """What the library holds on this machine, for `doctor`."""
    if reason := load_error():
        return {"loaded": False, "reason": reason}
    return {"loaded": True, "cpu": _ISA[ops().isa()], "cuda": ops().has_cuda()}
