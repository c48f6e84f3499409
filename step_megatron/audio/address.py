"""Audio addresses: where the bytes of one clip are.

    clip.wav                 a file
    shard.tar::a/clip.wav    a member of an uncompressed tar (WebDataset shards, NeMo tarred audio)
    shard.bin@1024+500       500 bytes from offset 1024 of any file

A tar member is found through the tar's index (`tar_index.py`), so reading one never scans the archive; for a clip of the audio
index not even that is needed (`AudioIndex.resolve`).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from step_megatron.audio.errors import AudioError

_TAR_MEMBER = re.compile(r"(?P<path>.*?\.tar)::(?P<member>.+)", re.DOTALL)
_COMPRESSED_TAR = re.compile(r".*?\.(tar\.\w+|tgz|tbz2?|txz)::", re.IGNORECASE | re.DOTALL)
_BYTE_RANGE = re.compile(r"(?P<path>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


@dataclass(frozen=True)
class AudioAddress:
    """Where a clip's encoded bytes are; `str()` gives the text form that `parse_address` reads.

    Attributes:
        path: the file, or the tar archive.
        member: name inside the archive; None for a plain file or a byte range.
        offset, size: the byte range; None for a plain file, and for a tar member that is yet to be looked up.
    """

    path: str
    member: str | None = None
    offset: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        if self.member is not None:
            return f"{self.path}::{self.member}"
        return self.path if self.offset is None else f"{self.path}@{self.offset}+{self.size}"

    @property
    def name(self) -> str:
        """The name whose extension tells the format, for formats without a header (raw g722)."""
        return self.member if self.member is not None else self.path

    def read(self) -> bytes:
        """The clip's encoded bytes.

        Raises:
            AudioError: `missing` (no such file or member), `unreadable` (the system refuses), `truncated` (the file ends before
                the range does), `corrupt` (a damaged archive).
        """
        offset, size = self.locate()
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                data = file.read(-1 if size is None else size)
        except OSError as error:
            raise _system_error(self.path, error) from error
        if size is not None and len(data) < size:
            raise AudioError("truncated", f"{self}: the file ends {size - len(data)} bytes before the clip does")
        return data

    def locate(self) -> tuple[int, int | None]:
        """Byte offset and size of the clip in `path`; the size is None for a whole file.

        Raises:
            AudioError: as `read`, for a tar whose index cannot be made or that lacks the member.
        """
        if self.member is None or self.offset is not None:
            return self.offset or 0, self.size
        from step_megatron.audio.tar_index import open_tar_index

        return open_tar_index(self.path).span(self.member)

    def stamp(self) -> tuple[int, int]:
        """Size and modification time (ns) of the file that holds the clip: what tells whether it changed.

        Raises:
            AudioError: `missing` or `unreadable`.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise _system_error(self.path, error) from error
        return status.st_size, status.st_mtime_ns


def parse_address(text: str, root: str | Path = "") -> AudioAddress:
    """Read an address; a relative path is taken from `root`.

    Raises:
        ValueError: for an empty address, a compressed tar (it cannot be read at a position), or an empty byte range.
    """
    if not text:
        raise ValueError("an audio address is empty; expected 'clip.wav', 'shard.tar::member.wav' or 'shard.bin@OFFSET+SIZE'")
    if _COMPRESSED_TAR.match(text):
        raise ValueError(f"{text}: a compressed tar cannot be read at a position; decompress it to .tar first")
    if match := _TAR_MEMBER.fullmatch(text):
        return AudioAddress(_under(root, match["path"]), member=match["member"])
    if match := _BYTE_RANGE.fullmatch(text):
        if int(match["size"]) == 0:
            raise ValueError(f"{text}: a byte range of size 0 holds no clip")
        return AudioAddress(_under(root, match["path"]), offset=int(match["offset"]), size=int(match["size"]))
    return AudioAddress(_under(root, text))


def _under(root: str | Path, path: str) -> str:
    return os.path.normpath(os.path.join(root, path))


def _system_error(path: str, error: OSError) -> AudioError:
    if isinstance(error, FileNotFoundError):
        return AudioError("missing", f"{path}: no such file")
    return AudioError("unreadable", f"{path}: {error.strerror or error}")
