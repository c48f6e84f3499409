"""Folders that are complete or absent: written beside their place, then put there by renaming, and on the disk by then."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def remove_leftovers(final: Path) -> None:
    """Undo what an interruption left beside `final`: nothing is there afterwards, and `final` is as it was before."""
    if _old(final).exists() and not final.exists():
        _old(final).rename(final)
    for leftover in (partial_of(final), _old(final)):
        shutil.rmtree(leftover, ignore_errors=True)


def partial_of(final: Path) -> Path:
    """Where the folder of `start_partial` is."""
    return final.with_name(f".{final.name}.partial")


def start_partial(final: Path) -> Path:
    """A fresh, empty folder beside `final` to write into."""
    remove_leftovers(final)
    partial_of(final).mkdir(parents=True)
    return partial_of(final)


def finish_partial(final: Path) -> None:
    """Put the folder of `start_partial` in the place of `final`, and delete what was there.

    An interruption leaves the old folder or the new one at `final`, or none for `remove_leftovers` to bring back; never a part.
    Files have to be on the disk already where a power failure counts as an interruption.
    """
    sync_folder(partial_of(final))
    if final.exists():
        final.rename(_old(final))
    partial_of(final).rename(final)
    sync_folder(final.parent)
    shutil.rmtree(_old(final), ignore_errors=True)


def abandon_partial(final: Path) -> None:
    """Delete the folder of `start_partial`, as far as that is possible."""
    shutil.rmtree(partial_of(final), ignore_errors=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that is at `final` when the block ends, and is gone when it fails."""
    partial = start_partial(final)
    try:
        yield partial
    except BaseException:
        abandon_partial(final)
        raise
    finish_partial(final)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk: a file that was synced is not found after a power failure without its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
