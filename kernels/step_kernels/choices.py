"""Which backend was measured to be the fastest for an op on a device: a file that `step-megatron bench OP --choose` writes.

    {"format": 1, "choices": [{"device": "NVIDIA H100 80GB HBM3", "op": "causal_attention_varlen", "dtype": "bfloat16",
                               "width": 128, "backend": "flash", "over": "triton", "ratio": 1.3, "date": "2026-01-31", ...}]}

A choice holds for one device name, op, dtype and width (the head dimension). The registry prefers it to the op's registered
order. The file is `~/.cache/step_kernels/choices.json`, or what `STEP_KERNELS_CHOICES` names; set but empty, no file is read.
The first, where it cannot be read or there is no home, counts as no file; one that was named is then an error.
Another backend gives other bits: processes that work together can compare `registry.computed_by`.
"""

import functools
import json
import os
import platform
import secrets
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
        threads: of torch in the measurement on a CPU; 0 on a GPU, and where it was not written down.
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
    threads: int = 0

    @property
    def key(self) -> Key:
        return self.device, self.op, self.dtype, self.width

    def why(self) -> str:
        """For people: when it was measured and by how much it won."""
        aged = "" if self.torch == torch.__version__ else f", with torch {self.torch}"
        threads = f" with {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        found = f"{self.ratio:.1f}x of {self.over}" if self.over else "no other runs here"
        return f"measured on {self.date}{threads}{aged}: {found}"


def path() -> Path | None:
    """The file, None where the environment says that none is to be read, or there is no home directory."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and a user that the system does not know
        return None
    return cache / "step_kernels" / "choices.json"


@functools.cache
def load() -> dict[Key, Choice]:
    """The choices in force; the file is read once a process.

    Raises:
        ValueError: the file is damaged, or the environment names one that cannot be read; names it and the remedy.
    """
    source = path()
    try:
        return _read(source)
    except OSError as error:
        if not os.environ.get(VARIABLE):
            return {}
        raise ValueError(
            f"{source}: the file that {VARIABLE} names cannot be read ({error.strerror or error}); repair that, name another, or "
            "set the variable empty to do without"
        ) from error


def find(device: torch.device, op: str, dtype: torch.dtype, width: int) -> Choice | None:
    """The choice for a tensor of this kind, None if none was measured."""
    known = load()
    return known.get((device_name(device), op, str(dtype).removeprefix("torch."), width)) if known else None


def to_write() -> tuple[Path, dict[Key, Choice]]:
    """The file that `write` would write, and what it holds already.

    Raises:
        ValueError: the file that is there is damaged, or there is none to write.
        OSError: it cannot be read.
    """
    target = path()
    if target is None:
        why = f"{VARIABLE} is empty" if VARIABLE in os.environ else "there is no home directory for the file of choices"
        raise ValueError(f"{why}: name the file that is to be written by {VARIABLE}")
    return target, _read(target)


def write(new: Sequence[Choice]) -> Path:
    """Add choices to the file, in place of those with the same key; atomic, so that no reader sees half a file.

    Raises:
        ValueError, OSError: as `to_write`; OSError also where it cannot be written.
    """
    target, known = to_write()
    merged = known | {choice.key: choice for choice in new}
    told = {"format": FORMAT, "choices": [asdict(choice) for _, choice in sorted(merged.items())]}
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`, whose files nobody else may read.
    unfinished = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(json.dumps(told, indent=1))
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
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


def _read(source: Path | None) -> dict[Key, Choice]:
    """What a file holds, nothing where there is none; raises OSError as reading does."""
    if source is None:
        return {}
    try:
        told = json.loads(source.read_text())
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}, this release reads {FORMAT}")
        read = [Choice(**entry) for entry in told["choices"]]
        return {_checked(choice).key: choice for choice in read}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, TypeError, KeyError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{source}: not a file of measured choices ({why}); delete it, and measure again with "
            "`step-megatron bench audio-attention --choose`, `... causal-attention --choose`"
        ) from error


_FIELDS = {
    str: ("device", "op", "dtype", "backend", "over", "date", "torch"),
    int: ("width", "threads"),
    (int, float): ("ratio",),
    list: ("cases",),
    dict: ("versions", "milliseconds", "excluded"),
}


def _checked(choice: Choice) -> Choice:
    """Refuse what no tensor can ever match, and values of another type: an edit by hand must not pass unnoticed."""
    from step_kernels import registry  # which imports this module

    for kind, names in _FIELDS.items():
        for name in names:
            if not isinstance(getattr(choice, name), kind):
                raise ValueError(f"{name} is {getattr(choice, name)!r}")
    if not isinstance(getattr(torch, choice.dtype, None), torch.dtype):
        raise ValueError(f"dtype is {choice.dtype!r}")
    if choice.op not in registry.registered():
        raise ValueError(f"op is {choice.op!r}; there are {', '.join(registry.registered())}")
    if choice.backend not in registry.BACKENDS:
        raise ValueError(f"backend is {choice.backend!r}; there are {', '.join(registry.BACKENDS)}")
    return choice
