"""The import benchmark measures an import, and a copy that is one; nothing stays behind."""

import json

import pytest
from conversion.foreign import same_bits, tensors_of

from step_megatron import cli
from step_megatron.benchmarks import import_speed


@pytest.fixture
def small(monkeypatch):
    for name, value in {"_WIDTH": 96, "_INNER": 160, "_VOCABULARY": 300, "_SHARD_BYTES": 100_000}.items():
        monkeypatch.setattr(import_speed, name, value)


def test_the_model_has_the_size_asked_for_and_the_copy_is_whole(small, tmp_path):
    size = import_speed.write_model(tmp_path / "theirs", 1_000_000)
    tensors = tensors_of(tmp_path / "theirs")
    assert size == sum(tensor.nbytes for tensor in tensors.values()) == pytest.approx(1e6, rel=0.1)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 5
    import_speed.copy_files(tmp_path / "theirs", tmp_path / "copy")
    same_bits(tensors_of(tmp_path / "copy"), tensors)


def test_figures_of_both(small, tmp_path, capsys):
    arguments = ["bench", "import", "--gigabytes", "0.001", "--repeats", "2", "--out", str(tmp_path / "here"), "--json"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["low"] <= result["ratio"] <= result["high"]
    speeds = result["gigabytes_per_second"]
    assert speeds.keys() == {"import", "copy"} and min(speeds.values()) > 0 and min(result["cpu_seconds"].values()) > 0
    assert not list((tmp_path / "here").iterdir())
    assert cli.main(["bench", "shares", "--gigabytes", "1"]) == 2
    assert "bench shares: has no --gigabytes; that is of import" in capsys.readouterr().err
