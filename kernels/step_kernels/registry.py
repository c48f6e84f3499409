"""Which backend runs an op: the first in the op's order of preference that can, on the tensor's device and dtype.

    cuda     CUDA C++ (`csrc/cuda`)            triton   Triton kernels of the op's own file
    cpp      C++ for the CPU (`csrc/cpu`)      torch    the op in plain torch

An op states with `register` which backends it has, for which dtypes. `STEP_KERNELS_BACKEND` forces one, or a list in order of
preference (`triton,cpp`); a backend that an op lacks or that cannot run is an error, never a silent fallback. Without it a dtype
that no faster backend covers (float64 on a CPU) goes to torch, and so does an op on a device for which nothing else was written;
a missing native library is an error all the same, for it is a broken installation.
"""

import os
from collections import Counter
from collections.abc import Collection
from importlib.util import find_spec

import torch

from step_kernels import native

BACKENDS = ("cuda", "triton", "cpp", "torch")
VARIABLE = "STEP_KERNELS_BACKEND"
HALF = (torch.bfloat16, torch.float16)
# Device on which a backend's kernels run; Triton's interpreter runs them on a CPU too, when asked to.
_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu"}

_ops: dict[str, dict[str, frozenset[torch.dtype]]] = {}
# How often each (op, backend) was chosen in this process.
chosen: Counter[tuple[str, str]] = Counter()


def register(op: str, **backends: Collection[torch.dtype]) -> None:
    """State the backends of an op, in order of preference, each with its dtypes; torch, which takes any, is added at the end."""
    _ops[op] = {name: frozenset(dtypes) for name, dtypes in backends.items()}


def registered() -> dict[str, tuple[str, ...]]:
    """The backends of every op, in order of preference."""
    return {op: (*backends, "torch") for op, backends in _ops.items()}


def backend(op: str, tensor: torch.Tensor, unfit: Collection[str] = ()) -> str:
    """Choose the backend of an op for a tensor like this one, not one of `unfit`, which do not take its sizes.

    Raises:
        RuntimeError: if `STEP_KERNELS_BACKEND` asks for what the op lacks or what cannot run here, or the installation is broken.
    """
    forced = os.environ.get(VARIABLE, "")
    name = _forced(op, tensor, forced, unfit) if forced else _preferred(op, tensor, unfit)
    chosen[op, name] += 1
    return name


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Every backend with the reason why it cannot run on `device`; an empty reason means that it can."""
    return {name: _unavailable(name, torch.device(device).type) for name in BACKENDS}


def backends_of(op: str, device: torch.device | str) -> dict[str, str]:
    """The backends of an op in order of preference, each with the reason why it cannot run on `device`."""
    return {name: _unavailable(name, torch.device(device).type) for name in registered()[op]}


def _preferred(op: str, tensor: torch.Tensor, unfit: Collection[str]) -> str:
    for name, dtypes in _ops[op].items():
        if _DEVICE[name] == tensor.device.type and tensor.dtype in dtypes and name not in unfit:
            if reason := _unavailable(name, tensor.device.type):
                raise RuntimeError(f"{op}: {reason}, or set {VARIABLE}=torch to run the op in plain torch")
            return name
    return "torch"


def _forced(op: str, tensor: torch.Tensor, forced: str, unfit: Collection[str]) -> str:
    wanted = [name.strip() for name in forced.split(",")]
    if unknown := [name for name in wanted if name not in BACKENDS]:
        raise RuntimeError(f"{VARIABLE}={forced}: {unknown[0]!r} is not a backend; there are {', '.join(BACKENDS)}")
    mine = [name for name in wanted if name == "torch" or name in _ops[op]]
    if not mine:
        raise RuntimeError(f"{VARIABLE}={forced}: {op} has {', '.join(registered()[op])}; add one of them to the list")
    mine = [name for name in mine if name not in unfit]
    if not mine:
        raise RuntimeError(f"{VARIABLE}={forced}: {op} does not take the sizes {tuple(tensor.shape)}; add torch to the list")
    if reason := _unavailable(mine[0], tensor.device.type):
        raise RuntimeError(f"{VARIABLE}={forced}: {op} cannot use {mine[0]}: {reason}")
    if mine[0] != "torch" and tensor.dtype not in _ops[op][mine[0]]:
        raise RuntimeError(f"{VARIABLE}={forced}: {op} by {mine[0]} does not take {tensor.dtype}; add torch to the list")
    return mine[0]


def _unavailable(name: str, device: str) -> str:
    """Why a backend cannot run on a kind of device; empty if it can."""
    if name == "torch":
        return ""
    if name == "triton" and find_spec("triton") is None:
        return "triton is not installed; `pip install 'triton>=3.6,<3.9'`"
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if _DEVICE[name] != device:
        return f"{name} kernels run on {_DEVICE[name]} tensors, not on {device}"
    if name == "triton":
        return ""
    if reason := native.load_error():
        return reason
    return (
        "" if name == "cpp" or native.ops().has_cuda() else "the native library was built without nvcc; install again with CUDA"
    )
