"""A rank's part of a checkpoint: copied into host memory, and written into files whose sums are taken on the way.

Everything that takes long here (a copy, a sum, a write to the disk) runs without Python's lock, so that a thread can do it beside
the training.
"""

import io
import json
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from step_megatron.checkpoint.seal import FileSum, SealedFile, write_sealed

BACKEND = ("torch_dist", 1)
Value = torch.Tensor | io.BytesIO
# A file that has reached this length is ended, so that ranks that read them for a check have something to share out.
_FILE_BYTES = 4 << 30


class HostCopies:
    """Host memory for a rank's tensors, allocated at the first save and used again by the next."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    @torch.no_grad()
    def of(self, items: list[tuple[WriteItem, Value]]) -> list[tuple[WriteItem, Value]]:
        """The same items with copies of their tensors, valid until the next call."""
        kept, copies = {}, []
        for item, value in items:
            if isinstance(value, torch.Tensor):
                buffer = self._buffers.get(item.index)
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                value = kept[item.index] = buffer.copy_(value, non_blocking=True)
            copies.append((item, value))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._buffers = kept
        return copies


@dataclass
class Written:
    """What a rank has written: the place of each of its parts, the sums of its files."""

    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    sums: dict[str, FileSum] = field(default_factory=dict)


def write_items(directory: Path, rank: int, items: Iterable[tuple[WriteItem, Value]]) -> Written:
    """Write a rank's items, in order, into files of its own; a value is asked for when it is its turn.

    Raises:
        OSError: of the disk.
    """
    written, remaining = Written(), iter(items)
    more = True
    while more:
        name = f"__{rank}_{len(written.sums)}.distcp"
        with SealedFile(directory / name) as file:
            more = False
            for item, value in remaining:
                start = file.tell()
                _write_value(file, value)
                file.check()
                written.places[item.index] = _StorageInfo(name, start, file.tell() - start)
                # One value at a time: before the next is asked for.
                del value
                if more := file.tell() >= _FILE_BYTES:
                    break
        written.sums[name] = file.sum
    return written


def write_index(directory: Path, metadata: Metadata, common: bytes, parts: list[Written]) -> dict[str, FileSum]:
    """Write what one rank writes for all of them; returns the sums of all files, for the seal.

    Raises:
        OSError: of the disk.
    """
    metadata.storage_data = {index: place for part in parts for index, place in part.places.items()}
    sums = {name: found for part in parts for name, found in part.sums.items()}
    sums[".metadata"] = write_sealed(directory / ".metadata", pickle.dumps(metadata))
    sums[COMMON_STATE_FNAME] = write_sealed(directory / COMMON_STATE_FNAME, common)
    sums[CONFIG_FNAME] = write_sealed(directory / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig(*BACKEND))).encode())
    return sums


def _write_value(file: SealedFile, value: Value) -> None:
    if isinstance(value, io.BytesIO):
        file.write(value.getbuffer())
        return
    value = value.detach().cpu().contiguous()
    if value.untyped_storage().nbytes() != value.nbytes:
        # A view would be written with all that it is a view of.
        value = value.clone()
    with torch.utils.serialization.config.patch({"save.compute_crc32": False}):
        torch.save(value, file)
