"""Weights into and out of Megatron's `torch_dist` layout one tensor at a time, for checkpoints that are larger than memory.

Megatron's own `save` wants every tensor of a rank at once, its `load` allocates all that it is asked for. Here the writer asks
for a tensor when its bytes go to the disk; the reader loads one parameter a call. The folders are those that training writes,
sealed alike: any parallel layout reads what is written here, and what any layout has saved is read.

The model describes itself: it is built on the meta device, in one process, and its sharded state says under which key, and with
what beside the tensors, a checkpoint of it is laid out.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from step_megatron.checkpoint import distributed, seal
from step_megatron.checkpoint.directory import CheckpointError
from step_megatron.checkpoint.safetensors_files import TensorInfo
from step_megatron.checkpoint.writing import Value, write_index, write_items
from step_megatron.runtime.megatron_reading import IndexReader
from step_megatron.runtime.megatron_writing import saved_bytes


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

    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, is_coordinator=True)
    (plan,), metadata = planner.create_global_plan([planner.create_local_plan()])

    def values() -> Iterator[tuple[WriteItem, Value]]:
        for item in plan.items:
            key = item.index.fqn
            if key not in names:
                yield item, planner.resolve_data(item)
                continue
            tensor = read(names[key])
            if tensor.shape != state[key].shape or tensor.dtype != state[key].dtype:
                raise ValueError(f"{names[key]}: {tuple(tensor.shape)} {tensor.dtype}, the model has {tuple(state[key].shape)}")
            written(names[key])
            yield item, tensor
            # One tensor at a time: before the next is read.
            del tensor

    directory.mkdir(parents=True, exist_ok=True)
    common = saved_bytes({"step": 0, _CONTENT_METADATA_KEY: distributed.LAYOUT})
    sums = write_index(directory, metadata, common, [write_items(directory, 0, values())])
    seal.write_seal(directory, sums, {"step": 0})


class WeightsReader:
    """The parameters of a model in a checkpoint, read one at a time.

    Args:
        directory: a checkpoint that any layout has saved.
        model: on the meta device, one pipeline stage, one tensor-parallel rank.

    Attributes:
        tensors: shape here (without the padding of a vocabulary) and type in the checkpoint, by full name.

    Raises:
        CheckpointError: no complete checkpoint, a damaged one, or one of another model; names every file that is damaged, or
            every parameter that does not fit.
    """

    def __init__(self, directory: Path, model: torch.nn.Module):
        distributed.check_whole(directory)
        distributed.check_layers(directory, model)
        self._directory, self._places = directory, {}
        self.tensors: dict[str, TensorInfo] = {}
        described = _described(model, distributed.layout_of(directory))
        self._reader = IndexReader(directory)
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
            raise CheckpointError("\n  ".join([f"{directory}: not a checkpoint of this model:", *wrong]))

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
            raise CheckpointError(f"{self._directory}: {name} cannot be read: {said}") from error
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


def _described(model: torch.nn.Module, layout: dict[str, Any]) -> dict[str, Any]:
    """Megatron's description of every parameter, by full name, and of the objects beside them."""
    return distributed.model_state([model], layout)["model"]
