"""Runs Megatron-Core on a CPU: every place where it takes a CUDA device for granted is mapped onto the CPU.

Megatron-Core names CUDA directly (`torch.cuda.current_device()` as a device, `device="cuda"`, `tensor.cuda()`, type strings
such as `torch.cuda.FloatTensor`). Its algorithms do not depend on CUDA, so with these names mapped, tensor, pipeline,
context, sequence and data parallelism run on gloo. `install()` is called by `runtime.initialize()`, never on import; it
changes nothing where CUDA is available. `uninstall()` puts torch back. Each adjustment has a test that fails without it
(`tests/runtime/test_megatron_cpu.py`).
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

_CPU = torch.device("cpu")
# The tensor factories that Megatron calls with a literal "cuda".
_FACTORIES = ("tensor", "zeros", "ones", "empty_like")
_RANDOM_LOGGER = "megatron.core.tensor_parallel.random"

# (owner, attribute) -> what was there before `install()`; empty when the adapter is not installed.
originals: dict[tuple[Any, str], Any] = {}


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")


def _factory(original: Callable) -> Callable:
    """Wrap a tensor factory: `device="cuda"` means the CPU, and `pin_memory`, which needs a CUDA driver, is dropped."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return make


def _tensor_type(original: Callable) -> Callable:
    """Wrap `Tensor.type`: Megatron's optimizer compares it with `torch.cuda.FloatTensor` and refuses anything else."""

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and caller.startswith("megatron.core.optimizer"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return type_


def _init_data(original: Callable) -> Callable:
    """Wrap `ShardedTensor.init_data(device)`: its default `torch.empty` was bound when Megatron was imported."""

    def init_data(self: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        return original(self, _CPU if _is_cuda(device) else device, *args, **kwargs)

    return init_data


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _adjustments() -> list[tuple[Any, str, Any]]:
    """Every replacement as (owner, attribute, replacement)."""
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.dist_checkpointing import ShardedTensor
    from torch._dynamo import config as dynamo

    cuda = torch.cuda
    table: list[tuple[Any, str, Any]] = [
        # Used as `device=torch.cuda.current_device()`: the value has to be a device, not an index.
        (cuda, "current_device", lambda: _CPU),
        (cuda, "synchronize", lambda device=None: None),
        (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
        (torch.Tensor, "type", _tensor_type(torch.Tensor.type)),
        (ShardedTensor, "init_data", _init_data(ShardedTensor.init_data)),
        # One generator plays both the host's and the device's: Megatron saves, seeds and restores it by turns.
        (cuda, "manual_seed", _manual_seed),
        (cuda, "get_rng_state", _get_rng_state),
        (cuda.random, "get_rng_state", _get_rng_state),
        (megatron_random, "_set_cuda_rng_state", _set_rng_state),
        # Megatron compiles its small helpers (`jit_fuser`): on a CPU that costs minutes and gains nothing. Read at each call, so
        # that helpers of modules that were imported before run as written as well.
        (dynamo, "disable", True),
    ]
    return table + [(torch, name, _factory(getattr(torch, name))) for name in _FACTORIES]


def _host_generator_is_the_device_generator(record: logging.LogRecord) -> bool:
    """Drop the warning that the host's generator moved inside a device context: here they are the same generator."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def install() -> bool:
    """Map Megatron's CUDA calls onto the CPU, in this process; calling it again does nothing.

    Returns:
        Whether the adapter is now active: False where CUDA is available.
    """
    if torch.cuda.is_available():
        return False
    if originals:
        return True
    # torch lists the factories that `with torch.device(...)` rules when it first needs them, for good: they have to be its own.
    _device._device_constructors()
    logging.getLogger(_RANDOM_LOGGER).addFilter(_host_generator_is_the_device_generator)
    for owner, name, replacement in _adjustments():
        originals[owner, name] = getattr(owner, name)
        setattr(owner, name, replacement)
    return True


def uninstall() -> None:
    """Put back what `install()` replaced; does nothing when it is not installed."""
    for (owner, name), original in originals.items():
        setattr(owner, name, original)
    originals.clear()
    logging.getLogger(_RANDOM_LOGGER).removeFilter(_host_generator_is_the_device_generator)
