"""The encoded-audio cache: features of the frozen encoder on a node's disk, kept between epochs and runs.

A folder for each encoder fingerprint holds shards that are only ever appended to, each written by one process:

    DIR/FINGERPRINT/SHARD.data     records, back to back

    record    magic, header bytes, payload bytes, CRC-32 of header and payload     16 bytes
              header: JSON {"sha256", "chunk_frames", "width", "failure"}, padded to 16 bytes
              payload: bfloat16 [sum(chunk_frames), width], little-endian, padded to 16 bytes

A record counts when it is whole and its checksum fits: a process killed in the middle leaves a torn tail that the next reader
stops at. The index is made in memory from the record headers; payloads are read through mmap, and checked. No
file is ever changed in place, so readers need no lock. When DIR, all fingerprints together, grows above its limit, the oldest
shards that no process writes leave; those of the fingerprint in use only when no other is left.
"""

import contextlib
import fcntl
import json
import mmap
import os
import re
import struct
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from step_megatron.runtime.progress import get_logger

_MAGIC = 0x53544550
_PREFIX = struct.Struct("<IIII")
_ALIGNMENT = 16
# A shard is closed at this size, or at this share of the whole, so that eviction has something to take.
_SHARD_BYTES = 256 << 20
_SHARDS_AT_LEAST = 8
# Whatever else lies in the folder that a user has named is not the cache's to remove.
_SHARD_NAME = re.compile(r"\d{20}-[0-9a-f]{8}\.data")

logger = get_logger(__name__)


@dataclass(frozen=True)
class EncodedClip:
    """What the encoder makes of one clip.

    Attributes:
        features: `[sum(chunk_frames), width]` bfloat16 at 25 Hz, the clip's chunks back to back.
        chunk_frames: 25 Hz frames of every chunk.
        failure: why the clip cannot be used, with no features; None for a good clip.
    """

    features: torch.Tensor
    chunk_frames: tuple[int, ...]
    failure: str | None = None

    def chunk(self, number: int) -> torch.Tensor:
        """Features of one chunk, `[its frames, width]`."""
        return self.features.narrow(0, sum(self.chunk_frames[:number]), self.chunk_frames[number])


@dataclass(frozen=True)
class _Record:
    shard: Path
    payload: int
    header: dict
    header_bytes: bytes
    checksum: int


class EncodedCache:
    """Encoded clips on disk by the SHA-256 of their encoded bytes, for one encoder.

    Several processes of a node may use one folder at once; each appends to shards of its own and sees the others' records after
    `refresh`.

    Args:
        folder: where shards go; node-local and fast.
        fingerprint: of the encoder's weights and maths: other features never mix with these.
        max_bytes: size that `folder` may reach, all fingerprints together, and one shard (an eighth, at most 256 MiB) more for
            each writer.
    """

    def __init__(self, folder: str | Path, fingerprint: str, max_bytes: int):
        self.folder = Path(folder) / fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self._shard_bytes = min(_SHARD_BYTES, max_bytes // _SHARDS_AT_LEAST)
        self._records: dict[str, _Record] = {}
        self._scanned: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._shard = None
        self._expected_frames = 0
        self._writable = True
        self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._records

    def expect(self, frames: int) -> None:
        """Warn, once it is known how wide features are, when clips of `frames` 25 Hz frames do not fit under the limit."""
        self._expected_frames = frames
        self._compare(next((record.header["width"] for record in self._records.values() if record.header["width"]), 0))

    def refresh(self) -> None:
        """Take in what other processes have appended, and forget shards that have left."""
        present = set(self.folder.glob("*.data"))
        for gone in set(self._scanned) - present:
            self._forget(gone)
        for shard in sorted(present):
            self._scan(shard)

    def get(self, sha256: str) -> EncodedClip | None:
        """A stored clip, or None. The features are a copy that may be kept. A damaged record counts as absent."""
        record = self._records.get(sha256)
        if record is None:
            return None
        frames, width = tuple(record.header["chunk_frames"]), record.header["width"]
        size = 2 * sum(frames) * width
        try:
            payload = self._map(record.shard, record.payload + size)[record.payload : record.payload + size]
        except OSError:
            payload = b""
        if len(payload) < size or zlib.crc32(payload, zlib.crc32(record.header_bytes)) != record.checksum:
            del self._records[sha256]
            return None
        features = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16) if size else torch.zeros(0, dtype=torch.bfloat16)
        return EncodedClip(features.reshape(sum(frames), width), frames, record.header["failure"])

    def failure(self, sha256: str) -> str | None:
        """Why a stored clip cannot be used, without reading it; None for a good clip and for one that is not here."""
        record = self._records.get(sha256)
        return None if record is None else record.header["failure"]

    def put(self, sha256: str, clip: EncodedClip) -> None:
        """Append a clip; one that is there already is left alone.

        Where the disk refuses (full, gone read-only), one warning says so and this process stores nothing more.

        Raises:
            ValueError: for features that are not bfloat16 or do not fit `chunk_frames`.
        """
        if sha256 in self._records or not self._writable:
            return
        features = clip.features.detach().cpu().contiguous()
        if features.dtype != torch.bfloat16 or features.shape[0] != sum(clip.chunk_frames):
            raise ValueError(
                f"features {tuple(features.shape)} {features.dtype} do not fit {sum(clip.chunk_frames)} bfloat16 frames"
            )
        entry = {"sha256": sha256, "chunk_frames": clip.chunk_frames, "width": features.shape[1], "failure": clip.failure}
        text = json.dumps(entry).encode()
        header = text + b" " * (-len(text) % _ALIGNMENT)
        payload = features.view(torch.uint8).numpy().tobytes()
        prefix = _PREFIX.pack(_MAGIC, len(header), len(payload), zlib.crc32(payload, zlib.crc32(header)))
        self._compare(features.shape[1])
        try:
            shard = self._writable_shard()
            shard.write(prefix + header + payload + bytes(-len(payload) % _ALIGNMENT))
            shard.flush()
        except OSError as error:
            self._give_up(error)
        else:
            self._scan(Path(shard.name))

    def close(self) -> None:
        """Close the shard being written; later `put`s open another."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _compare(self, width: int) -> None:
        """Hold what is expected against the limit, once."""
        needed = 2 * width * self._expected_frames
        if needed > self.max_bytes:
            logger.warning(
                "the run's clips take about %.3g GiB encoded, audio.cache_max_gib allows %.3g: they push each other out and are "
                "encoded again and again; raise it, or set audio.cache=off",
                needed / 2**30,
                self.max_bytes / 2**30,
            )
        if width:
            self._expected_frames = 0

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            "the encoded-audio cache %s cannot be written (%s); the run goes on and encodes what it lacks anew each time. Free "
            "space, lower audio.cache_max_gib or name another audio.cache_dir",
            self.folder,
            error.strerror or error,
        )
        self._writable = False
        # What is buffered cannot be written now either.
        with contextlib.suppress(OSError):
            self.close()
        self._shard = None

    def _writable_shard(self):
        if self._shard is not None and self._shard.tell() >= self._shard_bytes:
            self.close()
        if self._shard is None:
            self._evict()
            # Names sort by age. The lock says "being written" to the other processes' eviction, and ends with the process.
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.data"
            self._shard = open(self.folder / name, "xb")
            fcntl.flock(self._shard, fcntl.LOCK_EX)
        return self._shard

    def _evict(self) -> None:
        """Remove the oldest shards, this fingerprint's last, until one more fits under the limit."""
        sizes = {}
        shards = [shard for shard in self.folder.parent.glob("*/*.data") if _SHARD_NAME.fullmatch(shard.name)]
        for shard in sorted(shards, key=lambda shard: (shard.parent == self.folder, shard.name)):
            try:
                sizes[shard] = shard.stat().st_size
            except FileNotFoundError:
                continue
        excess = sum(sizes.values()) + self._shard_bytes - self.max_bytes
        for shard, size in sizes.items():
            if excess <= 0:
                return
            # An empty one is a shard that its writer has made a moment ago and not locked yet.
            if size and _removed_unless_written(shard):
                excess -= size
                self._forget(shard)

    def _scan(self, shard: Path) -> None:
        """Read the record headers that follow what is known of a shard; stop at a torn or foreign record."""
        position = self._scanned.get(shard, 0)
        try:
            with open(shard, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                while position + _PREFIX.size <= end:
                    file.seek(position)
                    magic, header_size, payload_size, checksum = _PREFIX.unpack(file.read(_PREFIX.size))
                    payload = position + _PREFIX.size + header_size
                    following = payload + payload_size + -payload_size % _ALIGNMENT
                    if magic != _MAGIC or following > end:
                        break
                    header_bytes = file.read(header_size)
                    header = _parse_header(header_bytes, payload_size)
                    if header is not None:
                        self._records[header["sha256"]] = _Record(shard, payload, header, header_bytes, checksum)
                    position = following
        except FileNotFoundError:
            return
        self._scanned[shard] = position

    def _map(self, shard: Path, needed: int) -> mmap.mmap:
        """The shard's mapping, renewed when the shard has grown beyond it."""
        mapped = self._maps.get(shard)
        if mapped is None or len(mapped) < needed:
            with open(shard, "rb") as file:
                mapped = self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def _forget(self, shard: Path) -> None:
        self._records = {sha256: record for sha256, record in self._records.items() if record.shard != shard}
        self._scanned.pop(shard, None)
        self._maps.pop(shard, None)


def _parse_header(header: bytes, payload_size: int) -> dict | None:
    """The record's header, or None when it does not describe the payload."""
    try:
        entry = json.loads(header)
        return (
            entry
            if 2 * sum(entry["chunk_frames"]) * entry["width"] == payload_size and "failure" in entry and entry["sha256"]
            else None
        )
    except (ValueError, KeyError, TypeError):
        return None


def _removed_unless_written(shard: Path) -> bool:
    """Remove a shard that no process holds the lock of."""
    try:
        with open(shard, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shard.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
