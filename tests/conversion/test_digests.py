"""Files that are not what somebody says they are stop an import; what was checked against what is recorded."""

import hashlib
import json
import subprocess

import pytest
from conversion import foreign

from step_megatron.conversion.digests import known_digests
from step_megatron.conversion.importing import import_model
from step_megatron.conversion.sources import ConversionError


@pytest.fixture
def model(tmp_path):
    foreign.text_model(tmp_path / "theirs", "qwen2")
    return tmp_path / "theirs"


def hub_record(folder, name, tag):
    """As `hf download --local-dir` leaves it."""
    place = folder / ".cache/huggingface/download"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.metadata").write_text(f"0123abcd\n{tag}\n1730000000.0\n")


def sha256(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_changed_byte_is_noticed_and_nothing_is_left(model, tmp_path):
    """One bit of a weight: no length and no header tells."""
    shard = sorted(model.glob("*.safetensors"))[0]
    hub_record(model, shard.name, sha256(shard))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for out in (tmp_path / "run", None):
        with pytest.raises(ConversionError, match=f"{shard.name}: its digest is .* the hub it was downloaded from says"):
            import_model(model, out)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_what_was_checked_is_recorded(model, tmp_path):
    first, *others = sorted(model.glob("*.safetensors"))
    hub_record(model, first.name, sha256(first))
    # Small files have git's digest at the hub.
    git = subprocess.run(["git", "hash-object", "config.json"], cwd=model, capture_output=True, text=True, check=True)
    hub_record(model, "config.json", git.stdout.strip())
    (model / "SHA256SUMS").write_text(f"{sha256(others[0])}  ./{others[0].name}\n\n{sha256(others[1])} *{others[1].name}\n")
    import_model(model, tmp_path / "run")
    (record,) = json.loads((tmp_path / "run" / "import.json").read_text())["models"]
    files = record["files"]
    assert {name: file["checked_against"] for name, file in files.items() if file["checked_against"]} == {
        **dict.fromkeys((first.name, "config.json"), "the hub it was downloaded from"),
        **dict.fromkeys((others[0].name, others[1].name), "SHA256SUMS"),
    }
    assert files.keys() >= {shard.name for shard in (first, *others)}
    assert all(file["sha256"] == sha256(model / name) for name, file in files.items())


def test_sums_that_are_none_are_named(model):
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\nnot a sum\n")
    with pytest.raises(ConversionError, match="SHA256SUMS:2: not `digest  file`"):
        known_digests(model)
