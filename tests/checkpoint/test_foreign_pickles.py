"""A checkpoint of foreign origin executes nothing, whichever of its files the harm is in, and says so."""

import builtins
import enum
import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from parallel import layouts
from torch.distributed.checkpoint.metadata import Metadata

from step_megatron.checkpoint.directory import checkpoint_root, latest_checkpoint
from step_megatron.checkpoint.seal import FileSum, write_seal
from step_megatron.errors import UserError


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return builtins.open, (self.marker, "w")


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def index_itself(folder: Path, harm: Harm) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(harm))


def inside_the_index(folder: Path, harm: Harm) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"plan": [harm]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class Attribute:
    """Is unpickled to an attribute of the index's class."""

    def __reduce__(self):
        return getattr, (Metadata, "__init__")


def attribute_in_the_index(folder: Path, harm: Harm) -> None:
    inside_the_index(folder, Attribute())


def outside_of_the_folder(folder: Path, harm: Harm) -> None:
    shutil.copy(folder / "__0_0.distcp", folder.parent / "elsewhere")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def common(folder: Path, harm: Harm) -> None:
    state = torch.load(folder / "common.pt", weights_only=True)
    (folder / "common.pt").write_bytes(saved(state | {"extra": harm}))


def an_item(folder: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of an item of the data files."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if name in index.fqn)
    file = folder / place.relative_path
    place.offset, place.length = file.stat().st_size, len(data)
    file.write_bytes(file.read_bytes() + data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def random_state(folder: Path, harm: Harm) -> None:
    an_item(folder, "random", saved([harm]))


def weight(folder: Path, harm: Harm) -> None:
    an_item(folder, "word_embeddings", saved(harm))


def seal_again(folder: Path) -> None:
    import hashlib

    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "seal.json"}
    (folder / "seal.json").unlink()
    write_seal(folder, {name: FileSum(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}, {})


def load(rank, world_size, *, run_dir) -> str:
    """What loading a run's checkpoint says; nothing when it goes on."""
    try:
        layouts.load_and_train(rank, world_size, transformer={}, optimizer="sgd", run_dir=run_dir)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def clean(worker_pool, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("clean")
    worker_pool(1).run(layouts.train_and_save, {"transformer": {}, "optimizer": "sgd", "steps": 1, "run_dir": str(run_dir)})
    return run_dir


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (index_itself, ".metadata: asks for io.open"),
        (inside_the_index, ".metadata: asks for io.open"),
        (attribute_in_the_index, ".metadata: asks for builtins.getattr of '__init__'"),
        (outside_of_the_folder, "names a file that is not in the folder: '../elsewhere'"),
        (common, "common.pt: holds something other than plain values and tensors"),
        (random_state, "random/shard_0_1: holds something other than plain values and tensors"),
        (weight, "a tensor of it: holds something other than plain values and tensors"),
    ],
)
def test_nothing_in_a_checkpoint_is_executed(plant, named, clean, worker_pool, tmp_path):
    run_dir, marker = tmp_path / "run", tmp_path / "harm done"
    shutil.copytree(clean, run_dir)
    folder = latest_checkpoint(run_dir)
    plant(folder, Harm(marker))
    seal_again(folder)
    (said,) = worker_pool(1).run(load, {"run_dir": str(run_dir)})
    assert not marker.exists()
    assert named in said and str(checkpoint_root(run_dir)) in said


def test_the_harm_is_real(tmp_path):
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm done"))).close()
    assert (tmp_path / "harm done").exists()


def test_the_same_files_without_harm_are_loaded(clean, worker_pool, tmp_path):
    shutil.copytree(clean, tmp_path / "run")
    seal_again(latest_checkpoint(tmp_path / "run"))
    assert worker_pool(1).run(load, {"run_dir": str(tmp_path / "run")}) == [""]


class EarlyPickler(pickle.Pickler):
    """Writes members of enumerations as Python 3.11 did before its fourth release."""

    members = 0

    def reducer_override(self, value):
        if not isinstance(value, enum.Enum):
            return NotImplemented
        self.members += 1
        return getattr, (type(value), value.name)


def test_an_index_that_an_early_python_3_11_wrote_is_loaded(clean, worker_pool, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(clean, run_dir)
    index = latest_checkpoint(run_dir) / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    with index.open("wb") as file:
        pickler = EarlyPickler(file)
        pickler.dump(metadata)
    assert pickler.members and b"getattr" in index.read_bytes()
    seal_again(index.parent)
    assert worker_pool(1).run(load, {"run_dir": str(run_dir)}) == [""]
