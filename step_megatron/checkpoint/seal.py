"""The seal of a checkpoint: `seal.json` names its files with their lengths and SHA-256 sums, and is written last.

    SealedFile         a file that is summed up as it is written, and on the disk when it is closed
    write_seal         the list of them
    verify             every file read once, shared out over the ranks; says which are damaged

The sums find what a disk, a copy or an interruption did; they say nothing about who wrote a checkpoint. What may be read from one
of unknown origin is the matter of `runtime.megatron_reading`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from step_megatron.runtime.agreement import Ranks

SEAL = "seal.json"
_BUFFER = 1 << 20
# From here on a piece is summed up on a thread of its own while it is written: neither holds Python's lock.
_LARGE = 1 << 20
# Bytes after which the disk is told to begin, so that closing a long file need not wait for all of it.
_AHEAD = 128 << 20


@dataclass(frozen=True)
class FileSum:
    """What is known of a file: its length, and the SHA-256 of its bytes in hexadecimal digits."""

    bytes: int
    sha256: str


class SealedFile:
    """A new file, summed up as it is written; `sum` holds what was written once it is closed without an error.

    An error of the disk is kept, and raised by `check` and on closing: torch's writer calls `write` from C++, which loses it.
    """

    def __init__(self, path: Path):
        self._file = open(path, "xb", buffering=_BUFFER)
        self._hash = hashlib.sha256()
        # One thread sums up, one waits for the disk.
        self._threads = ThreadPoolExecutor(2, "sealed-file")
        self._syncing: Future[None] | None = None
        self._length = self._synced = 0
        self._error: OSError | None = None
        self.sum: FileSum | None = None

    def write(self, data: bytes | memoryview) -> int:
        self._length += len(data)
        if self._error is None:
            summed = self._threads.submit(self._hash.update, data) if len(data) >= _LARGE else None
            try:
                self._file.write(data)
                self._sync_ahead()
            except OSError as error:
                self._error = error
            if summed is None:
                self._hash.update(data)
            else:
                # The memory is the caller's again afterwards.
                summed.result()
        return len(data)

    def tell(self) -> int:
        """Bytes so far."""
        return self._length

    def flush(self) -> None:
        """Nothing: the file is flushed, to the disk, when it is closed."""

    def check(self) -> None:
        """Raise the error of a `write` that failed."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "SealedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.check()
                self._file.flush()
                if self._syncing is not None:
                    self._syncing.result()
                os.fsync(self._file.fileno())
                self.sum = FileSum(self._length, self._hash.hexdigest())
        finally:
            self._threads.shutdown()
            _close(self._file)

    def _sync_ahead(self) -> None:
        if self._length - self._synced < _AHEAD or not (self._syncing is None or self._syncing.done()):
            return
        if self._syncing is not None:
            # The system tells an error of the disk once.
            self._syncing.result()
        self._synced = self._length
        self._syncing = self._threads.submit(os.fdatasync, self._file.fileno())


def write_sealed(path: Path, data: bytes) -> FileSum:
    """Write a whole file at once."""
    with SealedFile(path) as file:
        file.write(data)
    return file.sum


def write_seal(directory: Path, files: Mapping[str, FileSum], notes: Mapping[str, Any]) -> None:
    """Write `seal.json` for files in `directory`; `notes` (plain values) are kept beside the sums."""
    record = {"algorithm": "sha256", **notes, "files": {name: asdict(files[name]) for name in sorted(files)}}
    write_sealed(directory / SEAL, (json.dumps(record, indent=2) + "\n").encode())


def notes_of(directory: Path) -> dict[str, Any]:
    """What a seal says beside the sums; nothing where there is no readable one."""
    try:
        record = json.loads((directory / SEAL).read_bytes())
        return {name: value for name, value in record.items() if name not in ("algorithm", "files")}
    except (OSError, ValueError, AttributeError):
        return {}


def verify(directory: Path, ranks: Ranks) -> list[str]:
    """Hold every file against the seal; collective.

    Args:
        ranks: share the files out between them, each is read once.

    Returns:
        What is wrong, one line a file, the same on every rank; nothing for a whole checkpoint.
    """
    files, wrong = ranks.from_first(lambda: _read_seal(directory))
    if wrong:
        return [wrong]
    mine = _shares(files, ranks.size)[ranks.rank]
    found = [problem for name in mine if (problem := _compare(directory / name, files[name]))]
    return sorted(problem for problems in ranks.gather_all(found) for problem in problems)


def _read_seal(directory: Path) -> tuple[dict[str, FileSum], str]:
    """The sums by name, or what is wrong with the seal."""
    path = directory / SEAL
    try:
        record = json.loads(path.read_bytes())
        files = {name: FileSum(int(entry["bytes"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        if record["algorithm"] != "sha256" or not files or any(Path(name).name != name for name in files):
            raise ValueError("not a list of files with SHA-256 sums")
    except FileNotFoundError:
        return {}, f"{SEAL} is missing, so it was not completed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{SEAL} is damaged ({error!r})"
    return files, ""


def _shares(files: Mapping[str, FileSum], count: int) -> list[list[str]]:
    """Names for each of `count` readers: the longest file left goes to the one who has the least to read."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        idlest = loads.index(min(loads))
        shares[idlest].append(name)
        loads[idlest] += files[name].bytes
    return shares


def _compare(path: Path, expected: FileSum) -> str:
    """What is wrong with a file, or nothing."""
    try:
        length = path.stat().st_size
        if length != expected.bytes:
            return f"{path.name} has {length} bytes, {expected.bytes} were written"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if same else f"{path.name} is damaged: its bytes are not those that were written"


def _close(file: Any) -> None:
    """Close a file; what is still to be written cannot be when the disk is full, and that was said already."""
    try:
        file.close()
    except OSError:
        file.raw.close()
