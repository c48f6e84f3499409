"""Numbers of a run, step by step: `metrics.jsonl` (the record), TensorBoard, and Weights & Biases when a project is named.

A line of `metrics.jsonl` is `{"step": 10, "time": 1700000000.0, "loss": 1.25, "mfu": null, ...}`: strict JSON, so a value
that is not finite is the string `"nan"`, `"inf"` or `"-inf"`, which `float()` reads back, and an unknown value is null.
"""

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from step_megatron.config.schema import Config
from step_megatron.runtime.progress import rank

FILE_NAME = "metrics.jsonl"
# The id of the run at Weights & Biases, so that a resumed run goes on there as well.
_WANDB_ID = "wandb_id"


class MetricsWriter:
    """Writes the numbers of each step; rank 0 only, on other ranks every method does nothing.

    Args:
        run_dir: the run's directory, made when missing.
        config: `run.tensorboard` and `run.wandb_project` choose the outputs beside `metrics.jsonl`.
        resume_step: the step of the checkpoint that the run goes on from, 0 for a new run. Lines of later steps are removed, so
            that the record is that of one uninterrupted run.

    Raises:
        ImportError: `run.wandb_project` is set and wandb is not installed.
    """

    def __init__(self, run_dir: str | Path, config: Config, resume_step: int = 0) -> None:
        self._file = self._tensorboard = self._wandb = None
        if rank() != 0:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if config.run.wandb_project:
            self._wandb = _start_wandb(folder, config, resume_step)
        self._folder, self._with_tensorboard = folder, config.run.tensorboard
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        path = self._folder / FILE_NAME
        _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if self._with_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=resume_step + 1)

    def go_back(self, step: int) -> None:
        """Remove the lines after `step`: the run goes on from there. (Weights & Biases keeps what it was sent.)"""
        if self._file is not None:
            self._close_files()
            self._open(step)

    def flush(self) -> None:
        """Hand over everything written so far to the system: a kill after this loses nothing of it."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record `values` of `step`: finite, not finite, or None for what is unknown (e.g. MFU on a CPU)."""
        if self._file is None:
            return
        numbers = {name: None if value is None else float(value) for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3)} | {name: strict_number(value) for name, value in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        known = {name: value for name, value in numbers.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in known.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def close(self) -> None:
        """Flush and close every output; further calls do nothing."""
        self._close_files()
        if self._wandb is not None:
            self._wandb.finish()
        self._wandb = None

    def _close_files(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file = self._tensorboard = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The lines of a `metrics.jsonl` (or of the one in a run directory), oldest first, as floats.

    A last line that was cut off by a kill is left out; any other line that cannot be read is a ValueError with its number.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove the line to go on") from None
        out.append(
            {name: value if value is None else float(value) for name, value in values.items()} | {"step": int(values["step"])}
        )
    return out


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: allocated on the GPU by this process, or its resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def strict_number(value: float | None) -> float | str | None:
    """A number as strict JSON has it: one that is not finite as a string."""
    return value if value is None or math.isfinite(value) else str(value)


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`; the file is replaced at once, so that a kill leaves the old one or the new one."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({name: strict_number(value) for name, value in line.items()}) + "\n" for line in kept)
    os.replace(partial, path)


def _start_wandb(folder: Path, config: Config, resume_step: int) -> Any:
    """Start a run, or go on with the one of the checkpoint; from step 0 it is a new one, as `metrics.jsonl` is."""
    try:
        import wandb
    except ImportError:
        raise ImportError(
            "run.wandb_project is set, but wandb is not installed; "
            "run: pip install 'step-megatron[wandb]', or leave the setting empty"
        ) from None
    path = folder / _WANDB_ID
    known = path.read_text(encoding="utf-8").strip() if resume_step and path.exists() else None
    settings = dataclasses.asdict(config)
    run = wandb.init(
        project=config.run.wandb_project, name=folder.name, dir=str(folder), config=settings, id=known, resume="allow"
    )
    path.write_text(run.id + "\n", encoding="utf-8")
    return run
