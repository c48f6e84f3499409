"""A directory of safetensors files, read and written one tensor at a time.

    SafetensorsFiles(directory)         names, shapes and types of all tensors; `read(name)` one of them
    write_safetensors(directory, ...)   shards of at most 4 GiB, each tensor asked for when it is written, and the index

The library's own reader maps files into memory, where what was touched counts as this process's, and its writer wants all tensors
of a file at once. Here only the tensor in hand is in memory, and every length is checked before it is used.

Source: the format's own description. Eight bytes, little-endian, length of the header; a JSON object `{name: {dtype, shape,
data_offsets}}`, padded with spaces; the tensors' bytes without a gap. `model.safetensors.index.json` is Hugging Face's.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from step_megatron.errors import UserError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
_LARGEST_HEADER = 100 << 20
# What one system call reads or writes at most.
_PIECE = 1 << 28
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _TYPES.items()}


class SafetensorsError(UserError, ValueError):
    """Files that cannot be read; the message names the file, what is wrong with it and the remedy."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


class SafetensorsFiles:
    """The tensors of a directory; those that the index names where there is an index, else those of every `*.safetensors`.

    Attributes:
        tensors: name -> `TensorInfo`, in the order of the files.
        files: the files that hold them.

    Raises:
        SafetensorsError: no such file, a damaged one, a tensor in two files, or an index that does not fit the files.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        index = directory / INDEX
        named = _read_index(index) if index.is_file() else None
        self.files = (
            sorted(directory.glob("*.safetensors")) if named is None else [directory / n for n in sorted({*named.values()})]
        )
        if not self.files:
            raise SafetensorsError(f"{directory}: no *.safetensors here; give the folder that holds the weights")
        for file in self.files:
            self._add(file)
        for name, file in (named or {}).items():
            if name not in self._places or self._places[name].file.name != file:
                raise SafetensorsError(f"{index}: says that {name} is in {file}, where it is not; fetch the files again")

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, in memory of its own or in `into`, which is contiguous and has its shape and type.

        Raises:
            SafetensorsError: the file has become shorter.
        """
        info, place = self.tensors[name], self._places[name]
        tensor = torch.empty(info.shape, dtype=info.dtype) if into is None else into
        view = _bytes_of(tensor)
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done : done + _PIECE])
                if not count:
                    raise SafetensorsError(f"{place.file}: ends inside {name}; fetch the file again")
                done += count
        return tensor

    def _add(self, file: Path) -> None:
        for name, info, offset in _read_header(file):
            if name in self._places:
                raise SafetensorsError(f"{name} is in {self._places[name].file} and in {file}; keep the files of one model only")
            self.tensors[name], self._places[name] = info, _Place(file, offset)


def write_safetensors(
    directory: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], torch.Tensor],
    limit: int = SHARD_BYTES,
    written: Callable[[str], None] = lambda name: None,
    stem: str = "model",
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as several shards with an index where they are larger than `limit`.

    Args:
        tensors: what will be written, in order; `read(name)` has to return just that.
        limit: bytes of a shard; a larger tensor gets a shard of its own.
        written: called with a tensor's name when it is on its way to the disk.
        stem: what the files are called in place of `model`.

    Returns:
        The files, each complete.

    Raises:
        SafetensorsError: a type that the format does not have.
        ValueError: `read` returned another shape or type.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _plan(tensors, limit)
    single = len(shards) == 1
    numbers = [""] if single else [f"-{i + 1:05}-of-{len(shards):05}" for i in range(len(shards))]
    names = [f"{stem}{number}.safetensors" for number in numbers]
    for file, shard in zip(names, shards, strict=True):
        with (directory / file).open("wb") as stream:
            stream.write(_header({name: tensors[name] for name in shard}))
            for name in shard:
                _write_tensor(stream, name, tensors[name], read(name))
                written(name)
            stream.flush()
            os.fsync(stream.fileno())
    if not single:
        held = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        record = {
            "metadata": {"total_size": sum(info.bytes for info in tensors.values())},
            "weight_map": dict(sorted(held.items())),
        }
        (directory / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def _plan(tensors: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """The names of each shard; inside of a shard wide types come first, so that every tensor is aligned to its type."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.bytes
    return [sorted(shard, key=lambda name: -tensors[name].dtype.itemsize) for shard in shards]


def _header(tensors: Mapping[str, TensorInfo]) -> bytes:
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        if info.dtype not in _CODES:
            raise SafetensorsError(f"{name}: safetensors files have no type for {info.dtype}")
        table[name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, offset + info.bytes]}
        offset += info.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(stream: BinaryIO, name: str, info: TensorInfo, tensor: torch.Tensor) -> None:
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise ValueError(f"{name}: {tuple(tensor.shape)} {tensor.dtype} to write, {info.shape} {info.dtype} announced")
    view = _bytes_of(tensor.contiguous())
    for start in range(0, len(view), _PIECE):
        stream.write(view[start : start + _PIECE])


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory; it has to be contiguous."""
    if not tensor.numel():
        # NumPy's empty arrays have a stride of 0, which torch does not view in another type.
        return memoryview(bytearray())
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _read_index(path: Path) -> dict[str, str]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        sound = all(isinstance(file, str) and Path(file).name == file for file in named.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"{path}: not an index of safetensors files ({error!r}); fetch it again") from error
    if not sound:
        raise SafetensorsError(f"{path}: names a file outside of its folder; fetch it again")
    return named


def _read_header(path: Path) -> Iterator[tuple[str, TensorInfo, int]]:
    """Name, shape and type, and place in the file, of every tensor in it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise SafetensorsError(f"{path}: no safetensors file, or cut short ({size} bytes); fetch it again")
            table = json.loads(file.read(length))
    except OSError as error:
        raise SafetensorsError(f"{path}: {error.strerror}; fetch it again") from error
    except ValueError as error:
        if isinstance(error, SafetensorsError):
            raise
        raise SafetensorsError(f"{path}: its header is damaged ({error}); fetch it again") from error
    end = 0
    for name, entry in table.items() if isinstance(table, dict) else ():
        if name == "__metadata__":
            continue
        try:
            info = TensorInfo(tuple(int(n) for n in entry["shape"]), _TYPES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            sound = 0 <= start <= stop <= size - 8 - length and stop - start == info.bytes and min(info.shape, default=0) >= 0
        except (KeyError, TypeError, ValueError) as error:
            raise SafetensorsError(f"{path}: {name} is described as {entry}, which is not understood ({error!r})") from error
        if not sound:
            raise SafetensorsError(f"{path}: {name} should be at bytes {start} to {stop}: the file is cut short, fetch it again")
        end = max(end, stop)
        yield name, info, 8 + length + start
    if end != size - 8 - length:
        raise SafetensorsError(f"{path}: {size} bytes, its header speaks of {8 + length + end}; fetch it again")
