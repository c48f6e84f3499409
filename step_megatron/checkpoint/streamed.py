"""Weights into and out of Megatron's `torch_dist` layout one tensor at a time, for checkpoints that are larger than memory.

Megatron's own `save` wants every tensor of a rank at once, its `load` allocates all that it is asked for. Here the writer asks
for a tensor when its bytes go to the disk, each into a file of its own; the reader loads one parameter a call. The directories
are those of `checkpoint.distributed`: any parallel layout reads what is written here, and what any layout has saved is read.

The model describes itself: it is built on the meta device, in one process, and its sharded state says under which key, and with
what beside the tensors, a checkpoint of it is laid out.
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from step_megatron.checkpoint import distributed
from step_megatron.checkpoint.safetensors_files import TensorInfo


def write_weights(
    directory: Path,
    model: torch.nn.Module,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], torch.Tensor],
    written: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a checkpoint that holds weights alone, at step 0, into an empty directory.

    Args:
        model: on the meta device, one pipeline stage, one tensor-parallel rank.
        dtypes: type of each parameter, by full name: that of the tensors that `read` gives, whatever the model's own is.
        read: a parameter by its full name, asked for once, when it is written.
        written: called with a name when its tensor is on its way to the disk.
    """
    sharded = _described(model, distributed.LAYOUT)
    names = {item.key: name for name, item in sharded.items() if not isinstance(item, ShardedObject)}
    state: dict[str, Any] = {
        key: torch.empty(sharded[name].data.shape, dtype=dtypes[name], device="meta") for key, name in names.items()
    }
    state |= {item.unique_key: [item.data] for item in sharded.values() if isinstance(item, ShardedObject)}

    def resolve(key: str) -> torch.Tensor:
        tensor = read(names[key])
        if tensor.shape != state[key].shape or tensor.dtype != state[key].dtype:
            raise ValueError(f"{names[key]}: {tuple(tensor.shape)} {tensor.dtype}, the model has {tuple(state[key].shape)}")
        written(names[key])
        return tensor.contiguous()

    directory.mkdir(parents=True, exist_ok=True)
    # A file for every tensor: the writer keeps all tensors of a file until it is closed.
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, thread_count=1)
    dcp.save(state, storage_writer=writer, planner=_ReadWhenWritten(resolve), no_dist=True)
    torch.save({"step": 0, _CONTENT_METADATA_KEY: distributed.LAYOUT}, directory / COMMON_STATE_FNAME)
    # Last, as Megatron does: it makes the checkpoint a complete one.
    save_config(CheckpointingConfig(*distributed.BACKEND), str(directory))


class WeightsReader:
    """The parameters of a model in a checkpoint, read one at a time.

    Args:
        directory: a checkpoint that any layout has saved.
        model: on the meta device, one pipeline stage, one tensor-parallel rank.

    Attributes:
        tensors: shape here (without the padding of a vocabulary) and type in the checkpoint, by full name.

    Raises:
        CheckpointError: no complete checkpoint, or one of another model; names every parameter that does not fit.
    """

    def __init__(self, directory: Path, model: torch.nn.Module):
        self._directory, self._places = directory, {}
        self.tensors: dict[str, TensorInfo] = {}
        described = _described(model, distributed.layout_of(directory))
        self._reader = CachedMetadataFileSystemReader(str(directory))
        saved = self._reader.read_metadata().state_dict_metadata
        wrong = []
        for name, item in described.items():
            if isinstance(item, ShardedObject):
                continue
            # One process has all of a parameter, where gate and up are one below the other: the first of its shards says where.
            shard = item if isinstance(item, ShardedTensor) else next(iter(nested_values(item.build())))
            there = saved.get(item.key)
            if there is None:
                wrong.append(f"missing: {name}")
            elif not _fits(tuple(there.size), tuple(shard.global_shape), shard.allow_shape_mismatch):
                wrong.append(f"misshapen: {name} is {list(there.size)}, the configuration wants {list(shard.global_shape)}")
            else:
                self._places[name] = (item.key, shard.global_offset, shard.prepend_axis_num)
                self.tensors[name] = TensorInfo(tuple(item.data.shape), there.properties.dtype)
        if wrong:
            raise distributed.CheckpointError("\n  ".join([f"{directory}: not a checkpoint of this model:", *wrong]))

    def read(self, name: str) -> torch.Tensor:
        """The whole parameter with this full name.

        Raises:
            CheckpointError: damaged files.
        """
        info, (key, offsets, stacked) = self.tensors[name], self._places[name]
        tensor = torch.empty((1,) * stacked + info.shape, dtype=info.dtype)
        try:
            dcp.load({key: _Region(offsets, tensor)}, storage_reader=self._reader, planner=_RegionPlanner(), no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            said = str(error).strip().splitlines()[-1]
            raise distributed.CheckpointError(f"{self._directory}: {name} cannot be read: {said}") from error
        return tensor.view(info.shape)


class _Region:
    """A part of a saved tensor, as torch's checkpoints ask for it: only what lies in it is read."""

    def __init__(self, offsets: tuple[int, ...], tensor: torch.Tensor):
        self._offsets, self.tensor = torch.Size(offsets), tensor

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self._offsets, self.tensor.shape)]


class _RegionPlanner(dcp.DefaultLoadPlanner):
    """Plans for regions as they are; the default first replaces everything that is not a tensor by a copy."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict, metadata: dcp.Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def _fits(saved: tuple[int, ...], wanted: tuple[int, ...], padded: bool) -> bool:
    """Whether a saved tensor holds what is wanted; a vocabulary may hold padding besides."""
    return saved == wanted or (padded and saved[1:] == wanted[1:] and saved[0] > wanted[0])


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Plans by the meta tensors of the state, and gets a tensor only when the writer wants its bytes."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self._read(write_item.index.fqn)


def _described(model: torch.nn.Module, layout: dict[str, Any]) -> dict[str, Any]:
    """Megatron's description of every parameter, by full name, and of the objects beside them."""
    return distributed.model_state([model], layout)["model"]
