"""safetensors directories, beside the format's own library: read what it writes, write what it reads, refuse what is damaged."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from step_megatron.checkpoint.safetensors_files import INDEX, SafetensorsError, SafetensorsFiles, TensorInfo, write_safetensors

STATE = {
    "wide": torch.arange(12, dtype=torch.float64).view(3, 4),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "empty": torch.empty(0, 3),
    "empty, from NumPy": torch.from_numpy(np.concatenate([np.empty(0, np.int64)])),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "odd": torch.randn(3, generator=torch.Generator().manual_seed(1)).half(),
    "flags": torch.tensor([True, False, True]),
}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[n].dtype == t.dtype and torch.equal(actual[n], t) for n, t in expected.items()
    )


def written(folder, limit: int) -> list:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in STATE.items()}
    return write_safetensors(folder, infos, STATE.__getitem__, limit)


def test_reads_what_the_library_writes(tmp_path):
    names = list(STATE)
    save_file({name: STATE[name] for name in names[:2]}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({name: STATE[name] for name in names[2:]}, tmp_path / "b.safetensors")
    files = SafetensorsFiles(tmp_path)
    assert files.tensors["half"] == TensorInfo((5, 3), torch.bfloat16) and len(files.files) == 2
    assert same({name: files.read(name) for name in files.tensors}, STATE)


@pytest.mark.parametrize(("limit", "count"), [(1 << 30, 1), (100, 2), (1, 6)])
def test_the_library_reads_what_is_written(limit, count, tmp_path):
    files = written(tmp_path, limit)
    assert len(files) == count and (tmp_path / INDEX).exists() == (count > 1)
    read = {}
    for file in files:
        part = load_file(file)
        assert limit == 1 or sum(t.nbytes for t in part.values()) <= limit
        read |= part
    assert same(read, STATE)
    again = SafetensorsFiles(tmp_path)
    assert same({name: again.read(name) for name in again.tensors}, STATE)


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match="half: .* announced"):
        write_safetensors(tmp_path, {"half": TensorInfo((5, 3), torch.float32)}, STATE.__getitem__)


def test_every_truncation_is_refused(tmp_path):
    (file,) = written(tmp_path, 1 << 30)
    data = file.read_bytes()
    for size in range(0, len(data), 7):
        file.write_bytes(data[:size])
        with pytest.raises(SafetensorsError, match=r"model.safetensors: .*(fetch it again)"):
            SafetensorsFiles(tmp_path)
    file.write_bytes(data + b"x")
    with pytest.raises(SafetensorsError, match="its header speaks of"):
        SafetensorsFiles(tmp_path)
    file.write_bytes(data)
    files = SafetensorsFiles(tmp_path)
    file.write_bytes(data[:-1])
    with pytest.raises(SafetensorsError, match="ends inside"):
        [files.read(name) for name in files.tensors]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "x should be at bytes 0 to 4"),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, "x should be at bytes"),
        ({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, "x is described as"),
        ({"dtype": "F32", "shape": "no", "data_offsets": [0, 4]}, "x is described as"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "x should be at bytes"),
        ({"dtype": "F32"}, "x is described as"),
        (7, "x is described as"),
    ],
)
def test_headers_that_lie_are_refused(entry, message, tmp_path):
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(SafetensorsError, match=message):
        SafetensorsFiles(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    with pytest.raises(SafetensorsError, match="no \\*.safetensors here"):
        SafetensorsFiles(tmp_path)
    written(tmp_path, 100)
    index = tmp_path / INDEX
    table = json.loads(index.read_text())
    for change, message in (
        ({"half": "model-00001-of-00002.safetensors", "wide": "model-00002-of-00002.safetensors"}, "where it is not"),
        ({"gone": "model-00001-of-00002.safetensors"}, "gone is in"),
        ({"half": "model-00009-of-00002.safetensors"}, "00009.*No such file"),
        ({"half": "../model.safetensors"}, "outside of its folder"),
    ):
        index.write_text(json.dumps({"weight_map": table["weight_map"] | change}))
        with pytest.raises(SafetensorsError, match=message):
            SafetensorsFiles(tmp_path)
    index.write_text("[]")
    with pytest.raises(SafetensorsError, match="not an index"):
        SafetensorsFiles(tmp_path)
    index.unlink()
    save_file({"half": STATE["half"]}, tmp_path / "x.safetensors")
    with pytest.raises(SafetensorsError, match="half is in .* and in"):
        SafetensorsFiles(tmp_path)
