"""Which backend was measured to be the fastest for an op on a device: a file that `step-megatron bench OP --choose` writes.

    {"format": 1, "choices": [{"device": "NVIDIA H100 80GB HBM3", "op": "causal_attention_varlen", "dtype": "bfloat16",
                               "width": 128, "backend": "flash", "over": "triton", "ratio": 1.3, "date": "2026-01-31", ...}]}

A choice holds for one device name, op, dtype and width (the head dimension). The registry prefers it to the op's registered
order. The file is `~/.cache/step_kernels/choices.json`, or what `STEP_KERNELS_CHOICES` names; set but empty, no file is read.
Another backend gives other bits, so processes that work together need the same file on every node: they can compare `digest`.
"""

import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

VARIABLE = "STEP_KERNELS_CHOICES"
FORMAT = 1
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Choice:
    """One measurement and what came of it.

    Attributes:
        device: as `device_name` says.
        width: the head dimension.
        over: the second best, and how many times as long it took (`ratio`); empty and 0 where there was no other.
        date: of the measurement, ISO.
        versions: of the libraries behind the backends that were measured.
        milliseconds: median of every backend, for every case in the order of `cases`.
        excluded: backends that may not be chosen, each with the reason.
    """

    device: str
    op: str
    dtype: str
    width: int
    backend: str
    over: str
    ratio: float
    date: str
    torch: str
    versions: Mapping[str, str]
    cases: Sequence[str]
    milliseconds: Mapping[str, Sequence[float]]
    excluded: Mapping[str, str]

    @property
    def key(self) -> Key:
        return self.device, self.op, self.dtype, self.width

    def why(self) -> str:
        """For people: when it was measured and by how much it won."""
        aged = "" if self.torch == torch.__version__ else f", with torch {self.torch}"
        return f"measured on {self.date}{aged}: " + (f"{self.ratio:.1f}x of {self.over}" if self.over else "no other runs here")


def path() -> Path | None:
    """The file, None where the environment says that none is to be read."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step_kernels" / "choices.json"
    return Path(named) if named else None


@functools.cache
def load() -> dict[Key, Choice]:
    """The choices in force; the file is read once a process.

    Raises:
        ValueError: the file is damaged; names it and the remedy.
    """
    return _read()


def digest() -> str:
    """Hash of the choices in force, the same wherever the same backends are chosen."""
    chosen = sorted((*key, choice.backend) for key, choice in load().items())
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


def find(device: torch.device, op: str, dtype: torch.dtype, width: int) -> Choice | None:
    """The choice for a tensor of this kind, None if none was measured."""
    known = load()
    return known.get((device_name(device), op, str(dtype).removeprefix("torch."), width)) if known else None


def write(new: Sequence[Choice]) -> Path:
    """Add choices to the file, in place of those with the same key; atomic, so that no reader sees half a file.

    Raises:
        ValueError: the file that is there is damaged, or the environment names none.
    """
    target = path()
    if target is None:
        raise ValueError(f"{VARIABLE} is empty: name the file that is to be written, or unset it")
    merged = _read() | {choice.key: choice for choice in new}
    told = {"format": FORMAT, "choices": [asdict(choice) for _, choice in sorted(merged.items())]}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=target.name, delete=False) as file:
        try:
            json.dump(told, file, indent=1)
            file.close()
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
    load.cache_clear()
    return target


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read() -> dict[Key, Choice]:
    source = path()
    if source is None or not source.exists():
        return {}
    try:
        told = json.loads(source.read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}, this release reads {FORMAT}")
        read = [Choice(**entry) for entry in told["choices"]]
        return {_checked(choice).key: choice for choice in read}
    except (ValueError, TypeError, KeyError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{source}: not a file of measured choices ({why}); delete it, and measure again with "
            "`step-megatron bench audio-attention --choose`, `... causal-attention --choose`"
        ) from error


def _checked(choice: Choice) -> Choice:
    """Refuse a value of another type: an edit by hand must not pass unnoticed because no tensor ever matches it."""
    kinds = {str: ("device", "op", "dtype", "backend", "over", "date", "torch"), int: ("width",), (int, float): ("ratio",)}
    for kind, names in kinds.items():
        for name in names:
            if not isinstance(getattr(choice, name), kind):
                raise ValueError(f"{name} is {getattr(choice, name)!r}")
    if not isinstance(getattr(torch, choice.dtype, None), torch.dtype):
        raise ValueError(f"dtype is {choice.dtype!r}")
    return choice
