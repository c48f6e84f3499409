"""The seal: its sums are those that `sha256sum` would give, and every kind of damage is found and named."""

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.checkpoint import seal
from step_megatron.checkpoint.seal import FileSum, SealedFile, verify, write_seal, write_sealed
from step_megatron.runtime.agreement import Ranks


@pytest.fixture
def sealed(tmp_path):
    sums = {name: write_sealed(tmp_path / name, name.encode() * 1000) for name in ("a.distcp", "b.distcp", ".metadata")}
    write_seal(tmp_path, sums, {"step": 3, "validation_loss": 0.5})
    return tmp_path


def test_sums_are_those_of_the_bytes_on_the_disk(tmp_path):
    tensor = torch.randn(300_000)
    with SealedFile(tmp_path / "file") as file:
        file.write(b"head")
        torch.save(tensor, file)
        assert file.sum is None
        length = file.tell()
    data = (tmp_path / "file").read_bytes()
    assert file.sum == FileSum(len(data), hashlib.sha256(data).hexdigest()) and length == len(data)
    (tmp_path / "tensor").write_bytes(data[4:])
    assert torch.equal(torch.load(tmp_path / "tensor", weights_only=True), tensor)


def test_a_write_that_fails_inside_of_torch_is_the_error_that_is_seen(tmp_path):
    """Through torch's C++ writer an exception arrives as another one, without its number."""
    file = SealedFile(tmp_path / "file")
    real = file._file

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    file._file = Full()
    with pytest.raises(OSError, match="No space left") as caught, file:
        torch.save(torch.randn(1000), file)
    assert caught.value.errno == 28 and file.sum is None


def test_large_pieces_and_syncs_ahead_give_the_same_sum(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "_LARGE", 5000)
    monkeypatch.setattr(seal, "_AHEAD", 20_000)
    pieces = [bytes([number]) * (number * 997 % 9000) for number in range(40)]
    with SealedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    data = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == data
    assert file.sum == FileSum(len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("writes", [1, 5])
def test_an_error_of_a_sync_ahead_is_not_forgotten(writes, tmp_path, monkeypatch):
    """The system tells it once: the sync on closing would succeed."""

    def failing(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(seal, "_AHEAD", 1000)
    monkeypatch.setattr(seal.os, "fdatasync", failing)
    with pytest.raises(OSError, match="Input/output error"), SealedFile(tmp_path / "file") as file:
        for _ in range(writes):
            file.write(bytes(2000))
    assert file.sum is None


def test_a_whole_checkpoint_passes(sealed):
    assert verify(sealed, Ranks()) == []
    assert seal.notes_of(sealed) == {"step": 3, "validation_loss": 0.5}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a.distcp is damaged": lambda folder: flip(folder / "a.distcp"),
    "b.distcp has 7 bytes, 8000 were written": lambda folder: (folder / "b.distcp").write_bytes(b"b.distc"),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    "seal.json is missing": lambda folder: (folder / "seal.json").unlink(),
    "seal.json is damaged": lambda folder: (folder / "seal.json").write_text('{"files": {}}'),
    "seal.json is damaged ": lambda folder: (folder / "seal.json").write_bytes(b"\x80\x04half"),
    " seal.json is damaged": lambda folder: point_outside(folder / "seal.json"),
    "a.distcp cannot be read": lambda folder: ((folder / "a.distcp").unlink(), make_directory_of_length(folder)),
}


def point_outside(path):
    record = json.loads(path.read_text())
    record["files"]["../a.distcp"] = record["files"].pop("a.distcp")
    path.write_text(json.dumps(record))


def make_directory_of_length(folder):
    """A directory in place of the file, announced with the directory's own length."""
    (folder / "a.distcp").mkdir()
    record = json.loads((folder / "seal.json").read_text())
    record["files"]["a.distcp"]["bytes"] = (folder / "a.distcp").stat().st_size
    (folder / "seal.json").write_text(json.dumps(record))


@pytest.mark.parametrize("named", DAMAGE)
def test_damage_is_found_and_named(named, sealed):
    DAMAGE[named](sealed)
    (found,) = verify(sealed, Ranks())
    assert named.strip() in found


def test_all_that_is_damaged_is_named(sealed):
    flip(sealed / "a.distcp")
    (sealed / ".metadata").unlink()
    assert [problem.split()[0] for problem in verify(sealed, Ranks())] == [".metadata", "a.distcp"]


@given(st.lists(st.integers(0, 1 << 40), max_size=30), st.integers(1, 9))
def test_every_file_is_read_by_one_rank_and_the_work_is_even(lengths, count):
    files = {f"{i}": FileSum(length, "") for i, length in enumerate(lengths)}
    shares = seal._shares(files, count)
    assert sorted(name for share in shares for name in share) == sorted(files)
    loads = [sum(files[name].bytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
