"""Folders that are complete or absent: written beside their place, then put there by renaming."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def remove_leftovers(final: Path) -> None:
    """Delete what an interruption left beside `final`."""
    for leftover in (_partial(final), _old(final)):
        shutil.rmtree(leftover, ignore_errors=True)


def start_partial(final: Path) -> Path:
    """A fresh, empty folder beside `final` to write into."""
    remove_leftovers(final)
    _partial(final).mkdir(parents=True)
    return _partial(final)


def finish_partial(final: Path) -> None:
    """Put the folder of `start_partial` in the place of `final`, and delete what was there.

    An interruption leaves the old folder, the new one or none at `final`, never a part of one.
    """
    if final.exists():
        final.rename(_old(final))
    _partial(final).rename(final)
    shutil.rmtree(_old(final), ignore_errors=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that is at `final` when the block ends, and is gone when it fails."""
    partial = start_partial(final)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_partial(final)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
