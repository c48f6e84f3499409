"""An index of an uncompressed tar archive, kept beside it, so that members are read by position without scanning.

The sidecar `shard.tar.index` is JSON: the archive's size and modification time, then names, offsets and sizes of the regular
members in archive order. It is built once, replaced atomically, and rebuilt when the archive's size or time differ. Where the
folder is read-only the index lives in memory only.
"""

import functools
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator

from step_megatron.audio.address import AudioAddress
from step_megatron.audio.errors import AudioError

_VERSION = 1
_BLOCK = 512
# Type flags of regular files (two spellings) and folders.
_PLAIN_TYPES = b"0\0005"
# Members of a WebDataset shard that are clips; the others (.json, .txt) describe them.
_AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".g722", ".aiff", ".aif", ".au", ".caf", ".w64", ".webm")


class TarIndex:
    """Names, byte offsets and sizes of an archive's regular members, in archive order.

    A member's position is its number in that order: iteration can resume from any position without reading what came before.
    Of two members with one name the later wins, as `tar -x` has it.
    """

    def __init__(self, path: str, names: list[str], offsets: list[int], sizes: list[int]):
        self.path = path
        self._names, self._offsets, self._sizes = names, offsets, sizes
        self._position = {name: position for position, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._names)

    def span(self, member: str) -> tuple[int, int]:
        """Byte offset and size of a member.

        Raises:
            AudioError: `missing`.
        """
        position = self._position.get(member)
        if position is None:
            raise AudioError("missing", f"{self.path} has no member {member!r} ({len(self)} members)")
        return self._offsets[position], self._sizes[position]

    def address(self, position: int) -> AudioAddress:
        """Address of the member at a position."""
        return AudioAddress(self.path, member=self._names[position])

    def addresses(self, start: int = 0) -> Iterator[tuple[int, AudioAddress]]:
        """Position and address of every member from position `start` on; a resumed reader passes its last position + 1."""
        for position in range(start, len(self)):
            yield position, self.address(position)


def open_tar_index(path: str) -> TarIndex:
    """The index of an archive: from memory, else from its sidecar, else by one scan of the archive's headers.

    Raises:
        AudioError: `missing`, `unreadable`, or `corrupt` (not a tar, damaged, cut short, or with sparse members).
    """
    size, mtime_ns = AudioAddress(path).stamp()
    return _open(path, size, mtime_ns)


# Held in memory are few: an index of 100,000 members takes some 20 MB, and training reads without (`AudioIndex.resolve`).
@functools.lru_cache(maxsize=32)
def _open(path: str, size: int, mtime_ns: int) -> TarIndex:
    sidecar = path + ".index"
    stamp = {"version": _VERSION, "tar_size": size, "tar_mtime_ns": mtime_ns}
    content = _read_sidecar(sidecar, stamp)
    if content is None:
        content = stamp | _scan(path)
        _write_sidecar(sidecar, content)
    return TarIndex(path, content["names"], content["offsets"], content["sizes"])


def _read_sidecar(sidecar: str, stamp: dict[str, int]) -> dict | None:
    """The sidecar's content, or None when there is none, or it is damaged or out of date."""
    try:
        with open(sidecar, encoding="utf-8") as file:
            content = json.load(file)
        fits = all(content[key] == value for key, value in stamp.items())
        return content if fits and len(content["names"]) == len(content["offsets"]) == len(content["sizes"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_sidecar(sidecar: str, content: dict) -> None:
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(sidecar) or ".", prefix=".tar-index-")
    except OSError:
        return  # A read-only folder: every process scans once for itself.
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(temporary, sidecar)


def _scan(path: str) -> dict[str, list]:
    """Names, offsets and sizes of the regular members, from their headers alone."""
    try:
        members = _scan_plain(path) or _scan_any(path)
    except tarfile.TarError as error:
        raise AudioError("corrupt", f"{path}: not a readable uncompressed tar archive ({error})") from error
    except OSError as error:
        raise AudioError("unreadable", f"{path}: {error.strerror or error}") from error
    if members and members[-1][1] + members[-1][2] > os.path.getsize(path):
        raise AudioError("corrupt", f"{path}: the archive is cut short inside member {members[-1][0]!r}")
    names, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    return {"names": list(names), "offsets": list(offsets), "sizes": list(sizes)}


def _scan_plain(path: str) -> list[tuple[str, int, int]] | None:
    """Members of an archive of plain ustar headers, ten times as fast as `tarfile`; None for one that has anything else in it."""
    members, position = [], 0
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        while position + _BLOCK <= end:
            file.seek(position)
            header = file.read(_BLOCK)
            if header == bytes(_BLOCK):
                return members
            if header[156] not in _PLAIN_TYPES or header[257:262] != b"ustar":
                return None
            try:
                size, checksum = int(header[124:136].rstrip(b" \0"), 8), int(header[148:156].rstrip(b" \0"), 8)
            except ValueError:
                return None
            if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                return None
            name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
            if header[156] != ord("5"):
                # GNU headers have other things where ustar has the name's first part.
                parts = (prefix, name) if prefix and header[257:263] == b"ustar\0" else (name,)
                members.append((b"/".join(parts).decode("utf-8", "surrogateescape"), position + _BLOCK, size))
            position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return None


def _scan_any(path: str) -> list[tuple[str, int, int]]:
    """Members of any uncompressed archive that Python can read: long names, PAX headers, links."""
    members = []
    with tarfile.open(path, "r:") as archive:
        # `next` moves from header to header; `members` is emptied because it would keep every header alive.
        while (member := archive.next()) is not None:
            archive.members.clear()
            if member.issparse():
                raise AudioError("corrupt", f"{path}: member {member.name!r} is sparse; pack the archive without --sparse")
            if member.isreg():
                members.append((member.name, member.offset_data, member.size))
    return members


def expand_shards(pattern: str) -> list[str]:
    """Expand a shard pattern: WebDataset's `shard-{000..015}.tar` or NeMo's `audio__OP_0..15_CL_.tar`; zero padding is kept.

    Raises:
        ValueError: if a range runs backwards.
    """
    match = re.search(r"(?:\{|_OP_)(\d+)\.\.(\d+)(?:\}|_CL_)", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"{pattern}: the shard range {first}..{last} runs backwards")
    width = len(first) if first.startswith("0") else 0
    shards = [
        f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}" for number in range(int(first), int(last) + 1)
    ]
    return [expanded for shard in shards for expanded in expand_shards(shard)]


def audio_members(pattern: str) -> Iterator[AudioAddress]:
    """Every clip of the shards that a pattern names (see `expand_shards`), in order.

    Raises:
        AudioError: as `open_tar_index`.
        ValueError: as `expand_shards`.
    """
    for shard in expand_shards(pattern):
        for _, address in open_tar_index(shard).addresses():
            if address.name.lower().endswith(_AUDIO):
                yield address
