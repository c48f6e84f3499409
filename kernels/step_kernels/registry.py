"""Which backend runs an op: the first in the op's order of preference that can, on the tensor's device and dtype.

    cuda     CUDA C++ (`csrc/cuda`)            triton   Triton kernels of the op's own file
    cpp      C++ for the CPU (`csrc/cpu`)      torch    the op in plain torch
    flash    flash-attn, where installed       te       Transformer Engine, where installed

An op states with `register` which backends it has, for which dtypes. What was measured on this device (`step_kernels.choices`)
goes before that order, and `STEP_KERNELS_BACKEND` before both: it forces one, or a list in order of preference (`triton,cpp`); a
backend that an op lacks or that cannot run is then an error, never a silent fallback. It is read once, when this is imported; a
process changes its mind by `forced`. Without it a dtype that no faster backend covers (float64 on a CPU) goes to torch, and so
does an op on a device for which nothing else was written; a missing native library is an error all the same, for it is a broken
installation. The libraries are passed over where they are not installed.
"""

import importlib.metadata
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from step_kernels import attention_libraries, choices, native

LIBRARIES = ("flash", "te")
BACKENDS = ("cuda", "triton", *LIBRARIES, "cpp", "torch")
VARIABLE = "STEP_KERNELS_BACKEND"
HALF = (torch.bfloat16, torch.float16)
# Device on which a backend's kernels run; Triton's interpreter runs them on a CPU too, when asked to.
_DEVICE = {"cuda": "cuda", "triton": "cuda", "flash": "cuda", "te": "cuda", "cpp": "cpu"}

# What `VARIABLE` said: a look at the environment at every call would take as long as a small op.
in_force = os.environ.get(VARIABLE, "")
_ops: dict[str, dict[str, frozenset[torch.dtype]]] = {}
# How often each (op, backend) was chosen in this process.
chosen: Counter[tuple[str, str]] = Counter()
# Measured choices that cannot be followed: each is said once.
_said: set[choices.Key] = set()


def register(op: str, **backends: Collection[torch.dtype]) -> None:
    """State the backends of an op, in order of preference, each with its dtypes; torch, which takes any, is added at the end."""
    _ops[op] = {name: frozenset(dtypes) for name, dtypes in backends.items()}


def registered() -> dict[str, tuple[str, ...]]:
    """The backends of every op, in order of preference."""
    return {op: (*backends, "torch") for op, backends in _ops.items()}


@contextmanager
def forced(backends: str) -> Iterator[None]:
    """Run ops by other backends than `STEP_KERNELS_BACKEND` says, in its words; empty: by none in particular."""
    global in_force
    before, in_force = in_force, backends
    try:
        yield
    finally:
        in_force = before


def backend(op: str, tensor: torch.Tensor, unfit: Mapping[str, str] | None = None) -> str:
    """Choose the backend of an op for a tensor like this one, and count it.

    In a function that torch compiles the choice is made, and counted, once: when it is compiled.

    Args:
        tensor: its device, dtype and last dimension decide.
        unfit: backends that do not take this call, each with what it does not take.

    Raises:
        RuntimeError: if `STEP_KERNELS_BACKEND` asks for what the op lacks or what cannot run here, or the installation is broken.
        ValueError: if the file of measured choices is damaged, or cannot be read where it was named.
    """
    width = fixed(tensor.shape[-1]) if tensor.dim() else 0
    return _counted(op, tensor.device, tensor.dtype, width, unfit or {})


def fixed(size: int) -> int:
    """The same; torch's compiler takes it for a constant from here on, where a size is a symbol (it has several values)."""
    return range(size).stop


def _counted(op: str, device: torch.device, dtype: torch.dtype, width: int, unfit: Mapping[str, str]) -> str:
    name, _ = decide(op, device, dtype, width, unfit)
    chosen[op, name] += 1
    return name


# torch.compiler.assume_constant_result, which would import the compiler. Traced instead, it would look for files in the graph.
_counted._dynamo_marked_constant = True


def decide(
    op: str, device: torch.device, dtype: torch.dtype, width: int = 0, unfit: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The backend of an op for tensors of this kind, and why: for `doctor`, and for whoever keeps what an op computed.

    Arguments and errors as in `backend`; `width` is the last dimension.
    """
    unfit = unfit or {}
    if in_force:
        return _forced(op, device, dtype, unfit), f"forced by {VARIABLE}={in_force}"
    measured = choices.find(device, op, dtype, width)
    if measured and _can_follow(measured, device, dtype, unfit):
        return measured.backend, measured.why()
    return _preferred(op, device, dtype, unfit)


def decisions(device: torch.device | str) -> list[dict]:
    """For people: what runs every op on `device`, and why.

    Returns:
        `{"op", "dtype", "width", "backend", "why"}` of every op, in the float type of use, and of every choice that was measured
        on this device (elsewhere `width` is None: any). Where nothing can run an op, `backend` is empty and `why` the error.

    Raises:
        ValueError: if the file of measured choices is damaged.
    """
    device = torch.device(device)
    common = torch.float32 if device.type == "cpu" else torch.bfloat16
    cases = [(op, common, None) for op in _ops]
    for name, op, dtype, width in choices.load():
        if op in _ops and name == choices.device_name(device):
            cases.append((op, getattr(torch, dtype), width))
    told = []
    for op, dtype, width in cases:
        try:
            name, why = decide(op, device, dtype, width or 0)
        except RuntimeError as error:
            name, why = "", str(error)
        told.append({"op": op, "dtype": _short(dtype), "width": width, "backend": name, "why": why})
    return told


def computed_by(device: torch.device | str) -> dict[str, str]:
    """What computes every op on `device`, to be compared by processes whose results have to have the same bits.

    Returns:
        Of every `OP DTYPE` the backend and its version, and of an `OP DTYPE WIDTH` where a measured choice makes another one run.
        Other devices, dates and ratios of the file of choices do not show; what forces a backend does. Where nothing can run an
        op, it is left out: that is loud by itself.

    Raises:
        ValueError: if the file of measured choices is damaged, or cannot be read where it was named.
    """
    device = torch.device(device)
    cases = [(op, _short(dtype), 0) for op in _ops for dtype in (torch.float32, *HALF)]
    cases += [(op, dtype, width) for name, op, dtype, width in choices.load() if name == choices.device_name(device)]
    found: dict[str, str] = {}
    for op, dtype, width in cases:
        try:
            name, _ = decide(op, device, getattr(torch, dtype), width)
        except RuntimeError:
            continue
        by = f"{name} {version(name)}"
        if not width or found.get(f"{op} {dtype}") != by:
            found[f"{op} {dtype} {width}" if width else f"{op} {dtype}"] = by
    return found


def version(name: str) -> str:
    """Release of what is behind a backend that runs here."""
    if name in LIBRARIES:
        return attention_libraries.version(name)
    if name == "triton":
        return importlib.metadata.version("triton")
    return str(native.describe()["cpu"]) if name == "cpp" else torch.__version__


def available_backends(device: torch.device | str) -> dict[str, str]:
    """Every backend with the reason why it cannot run on `device`; an empty reason means that it can."""
    return {name: _unavailable(name, torch.device(device).type) for name in BACKENDS}


def backends_of(op: str, device: torch.device | str) -> dict[str, str]:
    """The backends of an op in order of preference, each with the reason why it cannot run on `device`."""
    return {name: _unavailable(name, torch.device(device).type) for name in registered()[op]}


def takes(op: str, name: str, dtype: torch.dtype) -> bool:
    """Whether an op has a backend for a dtype."""
    return name == "torch" or dtype in _ops[op].get(name, ())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _can_follow(measured: choices.Choice, device: torch.device, dtype: torch.dtype, unfit: Mapping[str, str]) -> bool:
    """Whether a measured choice holds for this call; one that can never hold here is said once."""
    op, name = measured.op, measured.backend
    if name in unfit:
        return False
    known = name in BACKENDS and takes(op, name, dtype)
    reason = _unavailable(name, device.type) if known else f"{op} has no {name} for {measured.dtype}"
    if reason and measured.key not in _said:
        _said.add(measured.key)
        warnings.warn(
            f"{choices.path()}: {op} ({measured.dtype}, {measured.width}) was measured to be fastest by {name}, which cannot "
            f"run: {reason}; the registered order is followed. Repair that, or measure again with `step-megatron bench --choose`",
            stacklevel=2,
        )
    return not reason


def _preferred(op: str, device: torch.device, dtype: torch.dtype, unfit: Mapping[str, str]) -> tuple[str, str]:
    # Asked once: making the string takes as long as all else here, and a decoding step comes dozens of times.
    kind = device.type
    first = True
    for name, dtypes in _ops[op].items():
        if _DEVICE[name] != kind:
            continue
        if dtype in dtypes and name not in unfit:
            reason = _unavailable(name, kind)
            if not reason:
                return name, "first of its order" if first else "first of its order that takes it"
            if name not in LIBRARIES:
                raise RuntimeError(f"{op}: {reason}, or set {VARIABLE}=torch to run the op in plain torch")
        first = False
    return "torch", f"the only one on {kind}" if first else "no other takes it"


def _forced(op: str, device: torch.device, dtype: torch.dtype, unfit: Mapping[str, str]) -> str:
    wanted = [name.strip() for name in in_force.split(",")]
    if unknown := [name for name in wanted if name not in BACKENDS]:
        raise RuntimeError(f"{VARIABLE}={in_force}: {unknown[0]!r} is not a backend; there are {', '.join(BACKENDS)}")
    mine = [name for name in wanted if name == "torch" or name in _ops[op]]
    if not mine:
        raise RuntimeError(f"{VARIABLE}={in_force}: {op} has {', '.join(registered()[op])}; add one of them to the list")
    fit = [name for name in mine if name not in unfit and takes(op, name, dtype)]
    if not fit:
        refused = unfit.get(mine[0], dtype)
        raise RuntimeError(f"{VARIABLE}={in_force}: {op} by {mine[0]} does not take {refused}; add torch to the list")
    if reason := _unavailable(fit[0], device.type):
        raise RuntimeError(f"{VARIABLE}={in_force}: {op} cannot use {fit[0]}: {reason}")
    return fit[0]


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
    if name in LIBRARIES:
        return attention_libraries.load_error(name)
    if reason := native.load_error():
        return reason
    return (
        "" if name == "cpp" or native.ops().has_cuda() else "the native library was built without nvcc; install again with CUDA"
    )
