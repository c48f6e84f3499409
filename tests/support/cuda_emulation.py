"""Run CUDA kernels on the CPU: `csrc/cuda/OP.cu`, compiled by the host's compiler against `csrc/emulation`.

Every launch runs once under the sanitizer of undefined behaviour (unaligned 16-byte loads among it) with every access checked
against the tensors' margins, and then with the threads in several orders. All must give the same bits: a kernel that needs one
order has a race. The margins hold NaN and must come back untouched.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from step_kernels import native, registry, toolkit

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
ORDERS = (0, 1, 2, 3)
# Undefined behaviour, and a call before every load and store, see csrc/emulation/memory.h.
SANITIZE = ("-fsanitize=undefined", "-fsanitize=kernel-address", "--param=asan-instrumentation-with-call-threshold=0")
SANITIZE += ("--param=asan-stack=0", "--param=asan-globals=0")
MARGIN = 1 << 14
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class EmulationError(AssertionError):
    """A kernel did what a GPU does not define, or gave other results in another order."""


@functools.cache
def compile_kernel(source: Path, *flags: str) -> ctypes.CDLL:
    """Compile a .cu file for the emulation; kept under `build/emulation` as long as no source changes.

    Raises:
        FileNotFoundError: CUDA's headers are missing; says how to get them.
        RuntimeError: the compiler refuses the source.
    """
    prelude = _prelude(*flags)
    command = [*_command(*flags), "-shared", "-include", str(prelude), "-x", "c++", str(source)]
    library = _made(command, source.read_bytes(), f"{source.stem}-", ".so")
    loaded = ctypes.CDLL(str(library))
    loaded.step_emulation_error.restype, loaded.step_emulation_forbid.restype = ctypes.c_char_p, ctypes.c_bool
    return loaded


@functools.cache
def _prelude(*flags: str) -> Path:
    """A header with what every kernel begins with, compiled beforehand: CUDA's own headers are most of a kernel's compilation."""
    text = f'#include "{CUDA / "portable.h"}"\n'
    header = ROOT / "build" / "emulation" / "prelude.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists() or header.read_text() != text:
        partial = header.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.replace(header)
    compiled = _made([*_command(*flags), "-x", "c++-header", str(header)], b"", "prelude-", ".h.gch")
    return compiled.with_suffix("")


def _command(*flags: str) -> list[str]:
    includes = [f"-I{folder}" for folder in toolkit.include_folders(toolkit.require_nvcc())]
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing"]
    return [*command, "-Wall", "-Wno-unknown-pragmas", *flags, f"-I{CUDA}", *includes]


def _made(command: list[str], source: bytes, prefix: str, suffix: str) -> Path:
    """What the command makes, under a name that says of what: the command, the source and all headers."""
    digest = hashlib.sha256("\0".join(command).encode() + source)
    for header in sorted((ROOT / "csrc").rglob("*.h")):
        digest.update(header.read_bytes())
    made = ROOT / "build" / "emulation" / f"{prefix}{digest.hexdigest()[:16]}{suffix}"
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[-1]} does not compile for the emulation:\n{done.stderr}")
        partial.replace(made)
    return made


def launch(source: Path, symbol: str, *arguments, sanitize: bool = True, orders: tuple[int, ...] = ORDERS) -> None:
    """Call a launcher with tensors, Python numbers (int: 64 bits, float: 32) and ctypes values, in every order.

    Tensors are inputs and outputs alike: they hold the kernel's results afterwards. The stream is added as the last argument.
    Tests of single faults leave out what their fault does not need, `sanitize` or some orders: each costs a compilation.

    Raises:
        EmulationError: see the module.
    """
    runs = [(compile_kernel(source, *SANITIZE), 0)] if sanitize else []
    runs += [(compile_kernel(source), order) for order in orders]
    first: list[torch.Tensor] = []
    for library, order in runs:
        results = _call(library, symbol, arguments, order)
        first = first or results
        for number, (ours, theirs) in enumerate(zip(results, first, strict=True)):
            if not torch.equal(_bytes(ours), _bytes(theirs)):
                raise EmulationError(f"{symbol}: tensor {number} has other bits with the threads in order {order}")
    for tensor, result in zip((x for x in arguments if isinstance(x, torch.Tensor)), first, strict=True):
        tensor.copy_(result)


def _call(library: ctypes.CDLL, symbol: str, arguments, order: int) -> list[torch.Tensor]:
    buffers, results, values = [], [], []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous(), "kernels take contiguous tensors"
            buffers.append(_with_margins(argument))
            inside = buffers[-1][MARGIN : buffers[-1].numel() - MARGIN].view(argument.dtype).view(argument.shape)
            results.append(inside)
            values.append(ctypes.c_void_p(inside.data_ptr()))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        else:
            values.append(ctypes.c_int64(argument) if isinstance(argument, int) else argument)
    for buffer in buffers:
        for place in (buffer.data_ptr(), buffer.data_ptr() + buffer.numel() - MARGIN):
            assert library.step_emulation_forbid(ctypes.c_void_p(place), ctypes.c_size_t(MARGIN)), "too many tensors"
    with mock.patch.dict(os.environ, {"STEP_EMULATION_ORDER": str(order)}), _stderr() as said:
        status = getattr(library, symbol)(*values, ctypes.c_void_p(0))
    library.step_emulation_allow()
    if status:
        raise EmulationError(f"{symbol}: {library.step_emulation_error().decode() or f'refused, CUDA error {status}'}")
    if "runtime error" in said[0]:
        raise EmulationError(f"{symbol}: undefined behaviour: {said[0]}")
    for number, buffer in enumerate(buffers):
        if not (buffer[:MARGIN] == 0xFF).all() or not (buffer[-MARGIN:] == 0xFF).all():
            raise EmulationError(f"{symbol}: writes outside tensor {number}")
    return results


def _with_margins(tensor: torch.Tensor) -> torch.Tensor:
    buffer = torch.full((tensor.numel() * tensor.element_size() + 2 * MARGIN,), 0xFF, dtype=torch.uint8)
    buffer[MARGIN : buffer.numel() - MARGIN] = _bytes(tensor)
    return buffer


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # A new tensor: one element may be contiguous with any stride, which cannot be viewed in another type.
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().flatten()).view(torch.uint8)


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """What native code writes to the standard error meanwhile, in the list's one entry at the end."""
    said, kept = [""], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said[0] = file.read().decode(errors="replace")


def _dtype(tensor: torch.Tensor) -> ctypes.c_int:
    return ctypes.c_int(DTYPES[tensor.dtype])


def _pool_norm_downsample_rows(hidden, source_row, weight, bias, eps, out):
    source = CUDA / "pool_norm_downsample.cu"
    arguments = (hidden, source_row, weight, bias, out, *out.shape, eps)
    launch(source, "step_pool_norm_downsample", _dtype(hidden), *arguments)


def _row_bytes(rows: torch.Tensor) -> int:
    return rows[0].numel() * rows.element_size() if len(rows) else 0


def _merge_audio(audio, positions, tokens):
    arguments = (audio, positions, len(positions), tokens, len(tokens), _row_bytes(tokens))
    launch(CUDA / "merge_audio.cu", "step_merge_audio", *arguments)


def _merge_audio_backward(gradient, positions, source, tokens, audio):
    wanted = tokens if tokens.numel() else ctypes.c_void_p(0)
    arguments = (gradient, positions, len(positions), source, wanted, audio, len(gradient), _row_bytes(gradient))
    launch(CUDA / "merge_audio.cu", "step_merge_audio_backward", *arguments)


def _gae_varlen(rewards, values, cu_seqlens, bootstrap, gamma, lam, advantages, returns):
    inputs = (rewards, values, cu_seqlens, bootstrap, len(bootstrap))
    launch(CUDA / "gae.cu", "step_gae_varlen", *inputs, float(gamma), float(gamma * lam), advantages, returns)


# What the bindings do on a GPU, by the name of the native op.
BINDINGS = {
    "pool_norm_downsample_rows": _pool_norm_downsample_rows,
    "merge_audio": _merge_audio,
    "merge_audio_backward": _merge_audio_backward,
    "gae_varlen": _gae_varlen,
}


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Let the backend `cuda` take CPU tensors: ops run through their own Python code down to the emulated kernels."""
    library = SimpleNamespace(has_cuda=lambda: True, **BINDINGS)
    with mock.patch.dict(registry._DEVICE, {"cuda": "cpu"}), mock.patch.object(native, "ops", lambda: library):
        yield
