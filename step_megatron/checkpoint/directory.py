"""The folder of a run's checkpoints: their names, which one is the newest, which ones stay. No tensor is touched here.

    RUN/checkpoints/step_00000200/           one folder a checkpoint, complete or absent
    RUN/checkpoints/latest                   the name of the one that the run goes on from
    RUN/checkpoints/damaged_step_00000150/   set aside when a check of it failed; `damaged.txt` in it says why

A checkpoint is written into a hidden folder beside its place, sealed (`checkpoint.seal`), synced and renamed, and only then does
`latest` name it, and only then are older ones deleted: whatever is interrupted, `latest` names a complete one.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from step_megatron.errors import UserError
from step_megatron.runtime import folders

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")
_HIDDEN = re.compile(r"\.(step_\d{8,})\.(partial|old|deleted)")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why, and the remedy."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete; the new one always does.

    Attributes:
        newest: how many of the newest, the new one included; 0 keeps all.
        every: those whose step is a multiple stay for good; 0 for none.
        best: whether the one with the lowest validation loss stays.
    """

    newest: int = 0
    every: int = 0
    best: bool = False


def checkpoint_root(run_dir: str | Path) -> Path:
    """The folder of a run that holds its checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_at(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for a copy under another name."""
    return int(name[1]) if (name := _STEP.fullmatch(checkpoint.name)) else None


def steps_in(root: Path) -> dict[int, Path]:
    """The checkpoints of a run, oldest first; copies that a user made beside them under other names are not among them."""
    found = {step: path for path in root.glob("step_*") if (step := step_of(path)) is not None and path.is_dir()}
    return dict(sorted(found.items()))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint that `latest` names, or None where a run has none yet; nothing is checked and nothing changed.

    Raises:
        CheckpointError: `latest` is missing, unreadable or names a folder that is gone, and there are checkpoints.
    """
    root = checkpoint_root(run_dir)
    named, wrong = read_latest(root)
    if named is not None:
        return named
    names = [path.name for path in steps_in(root).values()]
    if not names and not (root / LATEST).exists():
        return None
    raise CheckpointError(
        f"{root / LATEST}: {wrong}; write the name of a checkpoint into it (there are: {', '.join(names) or 'none'}), or train "
        "on: a run goes on from its newest good one"
    )


def read_latest(root: Path) -> tuple[Path | None, str]:
    """The checkpoint that `latest` names, or None and what is wrong with the file."""
    try:
        name = (root / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, "does not exist"
    except (OSError, ValueError) as error:
        return None, f"cannot be read ({error})"
    if not name or Path(name).name != name:
        return None, f"holds {name[:40]!r}, which is no name of a checkpoint"
    return (root / name, "") if (root / name).is_dir() else (None, f"names {name}, which does not exist")


def point_to(directory: Path) -> None:
    """Have `latest` name a checkpoint, at once and on the disk."""
    root = directory.parent
    temporary = root / f".{LATEST}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(directory.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, root / LATEST)
    folders.sync_folder(root)


def tidy(root: Path) -> None:
    """Clean up after a run that died: half-written and half-deleted checkpoints go, one that was being replaced comes back."""
    for path in list(root.glob(".step_*")):
        if (name := _HIDDEN.fullmatch(path.name)) is None:
            continue
        if name[2] == "deleted":
            shutil.rmtree(path, ignore_errors=True)
        else:
            folders.remove_leftovers(root / name[1])


def remove_others(newest: Path, retention: Retention, loss_of: Callable[[Path], float | None]) -> list[Path]:
    """Delete the checkpoints that need not stay now that `newest` is complete and `latest` names it.

    Those of later steps (of a run that went back) and copies under other names are left alone.

    Args:
        loss_of: the validation loss that a checkpoint was saved with, if it has one.

    Returns:
        What was deleted.
    """
    if not retention.newest:
        return []
    until = step_of(newest)
    steps = {step: path for step, path in steps_in(newest.parent).items() if step <= until}
    staying = set(list(steps)[-retention.newest :])
    if retention.every:
        staying |= {step for step in steps if step % retention.every == 0}
    if retention.best:
        losses = {step: loss for step, path in steps.items() if (loss := loss_of(path)) is not None}
        staying |= set(sorted(losses, key=losses.__getitem__)[:1])
    leaving = [path for step, path in steps.items() if step not in staying]
    for path in leaving:
        # Deleting takes a while: under its name there must not be a part of a checkpoint meanwhile.
        hidden = path.with_name(f".{path.name}.deleted")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return leaving


def set_aside(directory: Path, reason: str) -> Path:
    """Rename a damaged checkpoint, so that nothing goes on from it and nothing of it is lost; returns its new place."""
    number, place = 1, directory.with_name(f"damaged_{directory.name}")
    while place.exists():
        number += 1
        place = directory.with_name(f"damaged_{directory.name}_{number}")
    directory.rename(place)
    folders.sync_folder(place.parent)
    (place / "damaged.txt").write_text(reason + "\n", encoding="utf-8")
    return place
