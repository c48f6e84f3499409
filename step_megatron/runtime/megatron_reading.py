"""Megatron's `torch_dist` checkpoints, read without executing anything that is in them.

A checkpoint has three kinds of pickles, and Megatron-Core 0.16.1 and torch read two of them as they are:

    common.pt        `torch.load`, restricted to plain values and tensors unless an environment variable says otherwise
    .metadata        `pickle.load`: here only the classes of the index itself may be named
    __0_0.distcp     tensors, restricted by torch; objects (random states), `torch.load(weights_only=False)`: here restricted too
"""

import enum
import itertools
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from step_megatron.errors import UserError
from step_megatron.runtime.stored_regions import FilePart, read_region

_INDEX = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Megatron's own writer keeps the plans of all ranks, and a path, in its index.
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
}


class UnsafeCheckpoint(UserError, RuntimeError):
    """A checkpoint that holds what no checkpoint needs; the message names the file and what it is."""


def load(state: dict[str, Any], directory: Path, **options: Any) -> dict[str, Any]:
    """`dist_checkpointing.load`, safely; arguments as there.

    Raises:
        UnsafeCheckpoint: some pickle in it is not what it has to be.
        CheckpointException, and others: as `dist_checkpointing.load`.
    """
    dict_list_map_inplace(_merged_in_place, state)
    try:
        return dist_checkpointing.load(state, str(directory), _ShardedStrategy(), _CommonStrategy(), **options)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, UnsafeCheckpoint):
                raise cause from error
            if isinstance(cause, pickle.UnpicklingError):
                raise _unsafe(f"{directory}: a tensor of it", cause) from error
        raise


def _merged_in_place(value: Any) -> Any:
    """A weight that is stored in parts (gate and up): not put together anew where its parts are its own memory, read in place."""
    if not isinstance(value, ShardedTensorFactory) or not isinstance(value.data, torch.Tensor):
        return value
    whole, merge = value.data, value.merge_fn

    def merged(parts: Any) -> Any:
        place = whole.data_ptr()
        if isinstance(parts, list) and whole.is_contiguous():
            for part in parts:
                if not (isinstance(part, torch.Tensor) and part.is_contiguous() and part.data_ptr() == place):
                    break
                place += part.nbytes
        return whole if place == whole.data_ptr() + whole.nbytes else merge(parts)

    return replace(value, merge_fn=merged)


def load_common(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors and objects of single ranks.

    Raises:
        UnsafeCheckpoint: it is no plain values and tensors.
    """
    return _CommonStrategy().load_common(directory)


class IndexReader(FileSystemReader):
    """torch's reader of a checkpoint; the index is read once, and only if it is nothing but an index.

    Of a stored tensor only the region that is wanted is read, so that a rank reads its own slice, whoever wrote the whole.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            UnsafeCheckpoint: it names a function, an unknown class, or a file outside of the checkpoint.
        """
        if self._index is None:
            path = Path(self.path) / ".metadata"
            with path.open("rb") as file:
                index = _IndexUnpickler(file, path).load()
            places = (index.storage_data or {}).values()
            if outside := {place.relative_path for place in places if Path(place.relative_path).name != place.relative_path}:
                raise UnsafeCheckpoint(f"{path}: names a file that is not in the folder: {min(outside)!r}; do not use it")
            self._index = index
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors and objects.

        Raises:
            ValueError, EOFError: a file that does not hold what the index says.
        """
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        for name, items in itertools.groupby(tensors, lambda item: self.storage_data[item.storage_index].relative_path):
            with (Path(self.path) / name).open("rb", buffering=0) as file:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    target = planner.resolve_tensor(item).detach()
                    read_region(FilePart(file, place.offset, place.length), item.storage_offsets, target)
                    planner.commit_tensor(item, target)
        return super().read_data(replace(plan, items=[item for item in plan.items if item.type is LoadItemType.BYTE_IO]), planner)


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            # How Python 3.11 before its fourth release pickles a member of an enumeration.
            return self._member
        if name in _INDEX.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        self._refuse(f"{module}.{name}")

    def _member(self, owner: Any, name: str) -> enum.Enum:
        if isinstance(owner, enum.EnumMeta) and name in owner.__members__:
            return owner[name]
        self._refuse(f"builtins.getattr of {name!r}")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsafeCheckpoint(
            f"{self._path}: asks for {what}, which has no place in an index of tensors; do not use this checkpoint, "
            "whoever made it may have meant harm"
        )


class _CommonStrategy(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return _restricted(Path(checkpoint_dir) / COMMON_STATE_FNAME, Path(checkpoint_dir) / COMMON_STATE_FNAME)


class _ShardedStrategy(strategies.TorchDistLoadShardedStrategy):
    """Megatron's, with the reader and the planner of this file in place of those that it makes for itself."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        class Planner(strategies.MCoreLoadPlanner):
            def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
                name = read_item.dest_index.fqn
                set_element(self.original_state_dict, self.mappings[name], _restricted(value, f"{checkpoint_dir}: {name}"))

        # Before torch does: from an index that cannot be read it goes on to look for others.
        reader = IndexReader(checkpoint_dir)
        reader.read_metadata()
        with _replaced(strategies, _get_filesystem_reader=lambda *_, **__: reader, MCoreLoadPlanner=Planner):
            return super().load(sharded_state_dict, checkpoint_dir)


def _restricted(file: Path | IO[bytes], what: Path | str) -> Any:
    """Plain values and tensors."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unsafe(what, error) from error


def _unsafe(what: Path | str, error: pickle.UnpicklingError) -> UnsafeCheckpoint:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    said = f"it asks for {asked[1]}" if asked else str(error).splitlines()[0]
    return UnsafeCheckpoint(
        f"{what}: holds something other than plain values and tensors ({said}); do not use this checkpoint, whoever made it may "
        "have meant harm"
    )


@contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)
