"""Fields of Megatron's own dataclasses that a configuration passes through: checked by name, dtypes read from their names."""

import dataclasses
import difflib
from typing import Any, TypeVar

import torch

from step_megatron.config.load import ConfigError

Section = TypeVar("Section")


def build_section(kind: type[Section], values: dict[str, Any], where: str, **derived: Any) -> Section:
    """Make one of Megatron's dataclasses from the fields a configuration names.

    Args:
        kind: the dataclass, for example `OptimizerConfig`.
        values: the configuration's fields; a dtype field takes a torch dtype's name (`bfloat16`).
        where: section name for messages, for example `megatron.optimizer`.
        derived: fields that follow from other settings; the configuration must not contradict them.

    Raises:
        ConfigError: unknown field (names the nearest), a field that contradicts `derived`, or a value that Megatron refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    arguments = dict(derived)
    for name, value in values.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else ""
            raise ConfigError(f"unknown key {where}.{name}: {kind.__name__} of Megatron-Core has no such field{hint}")
        value = _dtype(value, f"{where}.{name}") if name.endswith("dtype") else value
        if name in derived and derived[name] != value:
            raise ConfigError(f"{where}.{name}={value!r} contradicts {derived[name]!r}, which the rest of the run asks for")
        arguments[name] = value
    try:
        return kind(**arguments)
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: Megatron-Core refuses these values: {error}") from error


def _dtype(value: Any, where: str) -> Any:
    """A torch dtype from its name; anything else is passed on for Megatron to judge."""
    if not isinstance(value, str):
        return value
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{where}={value!r}: not a torch dtype; write for example bfloat16 or float32")
    return dtype
