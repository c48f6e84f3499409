"""Read a region of a tensor that `torch.save` wrote: its own bytes and no others.

torch's reader of distributed checkpoints loads a stored tensor whole and then takes the part that is wanted: of a checkpoint that
one process wrote, every tensor-parallel rank would read everything. Here a rank reads what it keeps, straight into its place.

`torch.save` writes a zip file without compression, whose member `.../data/0` is the tensor's memory; torch itself says shape,
type and order (`map_location="meta"` reads no data).
"""

import io
import itertools
import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import torch

# What one system call reads at most.
_PIECE = 1 << 30
# Of a zip file's local header: where the lengths of name and extra field are, and where the name begins.
_LENGTHS, _NAME = 26, 30


class FilePart(io.RawIOBase):
    """Bytes `[offset, offset + length)` of an open file, as a file. (torch's own view cannot seek from its end.)"""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        super().__init__()
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


def read_region(file: BinaryIO, start: Sequence[int], target: torch.Tensor) -> None:
    """Read `stored[start : start + target.shape]` (in every dimension) into `target`.

    Args:
        file: the bytes that `torch.save` wrote for one tensor.
        target: on the CPU or not, contiguous or not, of any type that the stored one converts to.

    Raises:
        ValueError: not one plain tensor that is laid out row by row, or the region does not lie in it.
        EOFError: the file is cut short.
    """
    stored, begin = _stored(file)
    shape = tuple(target.shape)
    if len(start) != stored.dim() or any(low < 0 or low + n > m for low, n, m in zip(start, shape, stored.shape, strict=True)):
        raise ValueError(f"region {list(shape)} at {list(start)} of a tensor {list(stored.shape)}")
    direct = target.is_cpu and target.is_contiguous() and target.dtype == stored.dtype
    tensor = target if direct else torch.empty(shape, dtype=stored.dtype)
    memory = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
    done = 0
    for offset, count in _runs(stored, start, shape):
        file.seek(begin + offset)
        end = done + count
        while done < end:
            read = file.readinto(memory[done : min(end, done + _PIECE)])
            if not read:
                raise EOFError("the file ends before the tensor does")
            done += read
    if not direct:
        target.copy_(tensor)


def _stored(file: BinaryIO) -> tuple[torch.Tensor, int]:
    """The stored tensor without its data, and where its data begins."""
    file.seek(0)
    stored = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(stored, torch.Tensor) or not stored.is_contiguous():
        raise ValueError(f"holds no plain tensor that is laid out row by row, but {type(stored).__name__}")
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith("/data/0")]
    # What was saved may be a part of a larger storage.
    before = stored.storage_offset() * stored.itemsize
    if len(members) != 1 or members[0].compress_type != zipfile.ZIP_STORED or members[0].file_size < before + stored.nbytes:
        raise ValueError(f"its data is not {before + stored.nbytes} bytes without compression")
    file.seek(members[0].header_offset + _LENGTHS)
    return stored, members[0].header_offset + _NAME + sum(struct.unpack("<HH", file.read(4))) + before


def _runs(stored: torch.Tensor, start: Sequence[int], shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Offset and length, in bytes, of each stretch of the stored data that the region has without a gap, in order."""
    # The dimensions behind `outer` are taken whole: a run goes through all of them.
    outer = len(shape)
    while outer and shape[outer - 1] == stored.shape[outer - 1]:
        outer -= 1
    outer = max(0, outer - 1)
    count = math.prod(shape[outer:]) * stored.itemsize
    if not count:
        return
    strides = [stride * stored.itemsize for stride in stored.stride()]
    base = sum(low * stride for low, stride in zip(start, strides, strict=True))
    for place in itertools.product(*(range(n) for n in shape[:outer])):
        yield base + sum(n * stride for n, stride in zip(place, strides, strict=False)), count
