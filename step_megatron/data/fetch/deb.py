"""Read Debian packages without dpkg: an `ar` archive that holds `data.tar.{xz,gz}`.

- `open_data_tar(path)`: the files of the package as a streamed tar
- `extract(path, patterns, destination)`: the wanted members, safely

Source: deb(5) and the common ar format (a 60-byte header a member, even offsets).
"""

import fnmatch
import gzip
import io
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

_MAGIC = b"!<arch>\n"
_HEADER = 60


class DebError(ValueError):
    """A package that cannot be read, with the file and what is wrong with it."""


class _Section(io.RawIOBase):
    """A read-only window of `size` bytes at the file's present position, so that a decompressor stops at the member's end."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(min(len(buffer), self._left))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, int]]:
    """Yield `(name, size)` of each ar member with the file placed at its content."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise DebError(f"{path}: not a Debian package (no ar magic); delete it and fetch again")
    position = len(_MAGIC)
    while header := file.read(_HEADER):
        if len(header) < _HEADER or header[58:] != b"`\n":
            raise DebError(f"{path}: broken ar header at byte {position}; delete it and fetch again")
        field = header[48:58].decode("ascii", "replace").strip()
        if not field.isdigit():
            raise DebError(f"{path}: ar member size {field!r} at byte {position} is not a number; delete it and fetch again")
        size = int(field)
        yield header[:16].decode("ascii", "replace").rstrip().rstrip("/"), size
        position += _HEADER + size + size % 2
        file.seek(position)


@contextmanager
def open_data_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open the data archive of the package at `path` as a tar stream (iterate once, in order).

    Raises:
        DebError: not a package, a broken header, no data archive, or a compression other than xz, gzip or none.
    """
    openers = {
        "data.tar.xz": lambda section: lzma.open(section),
        "data.tar.gz": lambda section: gzip.open(section),
        "data.tar": lambda section: section,
    }
    with path.open("rb") as file:
        for name, size in _members(file, path):
            if not name.startswith("data.tar"):
                continue
            if name not in openers:
                raise DebError(f"{path}: {name} is not supported (only xz, gzip and plain tar); convert it with dpkg-deb first")
            with openers[name](io.BufferedReader(_Section(file, size))) as stream:
                with tarfile.open(fileobj=stream, mode="r|", encoding="utf-8") as archive:
                    yield archive
            return
    raise DebError(f"{path}: no data.tar member; the file is cut short or is not a binary package")


def safe_member_path(name: str, origin: str) -> PurePosixPath:
    """The archive member's path relative to the extraction root.

    Raises:
        DebError: if the path is absolute or steps out of the root.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DebError(f"{origin}: member {name!r} would be written outside the destination; refused")
    return path


def extract(path: Path, patterns: list[str], destination: Path) -> int:
    """Write the regular files of the package that match one of `patterns` under `destination`.

    Links and devices are never written: no wanted file is one, and a link can lead out of the root.

    Args:
        path: the `.deb` file.
        patterns: shell patterns over member paths without the leading `./`; `*` also crosses `/`.
        destination: directory, made if missing.

    Returns:
        The number of files written.

    Raises:
        DebError: a broken package, a member that would leave `destination`, or patterns that match nothing.
    """
    matched = dict.fromkeys(patterns, 0)
    written = 0
    try:
        with open_data_tar(path) as archive:
            for member in archive:
                relative = safe_member_path(member.name, str(path))
                hits = [pattern for pattern in patterns if fnmatch.fnmatchcase(str(relative), pattern)]
                if not hits or not member.isfile():
                    continue
                target = destination / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as source, target.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                written += 1
                for pattern in hits:
                    matched[pattern] += 1
    except (lzma.LZMAError, tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise DebError(f"{path}: the data archive is damaged ({error}); delete it and fetch again") from error
    if missing := [pattern for pattern, count in matched.items() if not count]:
        raise DebError(f"{path}: no file matches {missing}; the package's layout is not the pinned one")
    return written
