"""validate: every clip is right or quarantined with its reason, nothing is read twice, an interruption costs nothing."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
import soundfile
from audio.audio_files import encoded, voice, write_voice

from step_megatron.audio import index as index_module
from step_megatron.audio import tar_index
from step_megatron.audio.address import AudioAddress
from step_megatron.audio.errors import QuarantineLimitExceeded
from step_megatron.audio.index import AudioIndex, validate

GOOD = {
    "plain.wav": encoded(voice(1.0)),
    "rate.wav": encoded(voice(1.0, 44100), 44100),
    "low.flac": encoded(voice(1.0, 8000), 8000, "FLAC"),
    "stereo.wav": encoded(voice(1.0, channels=2)),
    "eight.wav": encoded(voice(1.0), subtype="PCM_U8"),
    "twentyfour.wav": encoded(voice(1.0), subtype="PCM_24"),
    "float.wav": encoded(voice(1.0), subtype="FLOAT"),
    "speech.ogg": encoded(voice(1.0), container="OGG"),
    "speech.mp3": encoded(voice(1.0), container="MP3"),
    "faint.wav": encoded(np.where(np.arange(16000) == 8000, 1.0 / 32768, 0.0), subtype="PCM_16"),
}
# file -> (content or None for no file, kind, words of the reason)
BAD = {
    "gone.wav": (None, "missing", "no such file"),
    "empty.wav": (b"", "empty", "0 bytes"),
    "noise.wav": (bytes(range(256)) * 20, "corrupt", "not audio"),
    "cut.wav": (GOOD["plain.wav"][:9000], "truncated", "promises"),
    "cut.flac": (GOOD["low.flac"][:3000], "corrupt", ""),
    "silent.wav": (encoded(np.zeros(16000)), "silent", "digital silence"),
    "silent8.wav": (encoded(np.zeros(16000), subtype="PCM_U8"), "silent", "digital silence"),
    "both.wav": (encoded(np.zeros((16000, 2))), "silent", "digital silence"),
    "blip.wav": (encoded(voice(0.02)), "too-short", "320 samples"),
    "long.wav": (encoded(voice(6.0)), "too-long", "6.0 s; the limit is 5 s"),
}


@pytest.fixture
def corpus(tmp_path):
    for name, data in GOOD.items() | {(name, data) for name, (data, _, _) in BAD.items() if data is not None}:
        (tmp_path / name).write_bytes(data)
    return tmp_path


def quarantine(folder):
    return {entry["address"]: entry for entry in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())}


def test_every_clip_is_right_or_quarantined_with_its_reason(corpus):
    report = validate([*GOOD, *BAD], corpus, corpus, quarantine_limit=1.0, max_seconds=5.0, threads=2)
    assert (report.total, report.valid, report.quarantined, report.read) == (
        len(GOOD) + len(BAD),
        len(GOOD),
        len(BAD),
        len(GOOD) + len(BAD),
    )
    assert report.kinds["silent"] == 3 and sum(report.kinds.values()) == len(BAD)
    index = AudioIndex.load(corpus)
    assert len(index) == len(GOOD)
    for name, data in GOOD.items():
        samples, rate = soundfile.read(io.BytesIO(data), always_2d=True)
        assert index[name].sha256 == hashlib.sha256(data).hexdigest()
        assert (index[name].sample_rate, index[name].channels) == (rate, samples.shape[1])
        assert index[name].num_samples == 16000 and index[name].duration == 1.0
    entries = quarantine(corpus)
    assert entries.keys() == BAD.keys()
    for name, (_, kind, words) in BAD.items():
        assert entries[name]["kind"] == kind and words in entries[name]["reason"], entries[name]
        assert index.reason(name) == entries[name]["reason"] and name not in index
        with pytest.raises(KeyError, match="is quarantined"):
            index[name]
    with pytest.raises(KeyError, match="data validate"):
        index["unheard.wav"]


def test_a_share_above_the_limit_stops_with_counts_and_reasons(corpus):
    with pytest.raises(QuarantineLimitExceeded) as caught:
        validate([*GOOD, *BAD], corpus, corpus, quarantine_limit=0.49, max_seconds=5.0, threads=1)
    message = str(caught.value)
    for words in ("10 of 20 clips (50.0%)", "limit is 49.0%", "3 silent", "digital silence", "quarantine.jsonl"):
        assert words in message
    assert len(quarantine(corpus)) == len(BAD) and len(AudioIndex.load(corpus)) == len(GOOD)
    validate([*GOOD, *BAD], corpus, corpus, quarantine_limit=0.5, max_seconds=5.0, threads=1)


def test_unchanged_files_are_not_read_again(corpus, monkeypatch):
    names = [*GOOD, *BAD]
    first = validate(names, corpus, corpus, quarantine_limit=1.0, max_seconds=5.0, threads=1)
    files = {name: (corpus / name).read_bytes() for name in ("index.jsonl", "quarantine.jsonl")}
    read = []
    original = AudioAddress.read
    monkeypatch.setattr(AudioAddress, "read", lambda self: read.append(os.path.basename(self.path)) or original(self))
    second = validate(names, corpus, corpus, quarantine_limit=1.0, max_seconds=5.0, threads=1)
    # A clip that was too long is looked at again: the limit may be another one now.
    assert read == ["long.wav"] and second.valid == first.valid
    assert {name: (corpus / name).read_bytes() for name in files} == files
    (corpus / "cut.wav").write_bytes(GOOD["plain.wav"])
    (corpus / "plain.wav").write_bytes(b"")
    read.clear()
    third = validate(names, corpus, corpus, quarantine_limit=1.0, max_seconds=60.0, threads=1)
    assert sorted(read) == ["cut.wav", "long.wav", "plain.wav"] and third.valid == first.valid + 1
    index = AudioIndex.load(corpus)
    assert "cut.wav" in index and "long.wav" in index and "plain.wav" not in index
    assert quarantine(corpus)["plain.wav"]["kind"] == "empty"


def test_another_decoder_reads_everything_again(corpus, monkeypatch):
    validate(GOOD, corpus, corpus, threads=1)
    monkeypatch.setattr(index_module, "decoder_version", lambda: "another")
    assert validate(GOOD, corpus, corpus, threads=1).read == len(GOOD)
    assert validate(GOOD, corpus, corpus, threads=1).read == 0


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    names = [write_voice(tmp_path / f"{i:03d}.wav", 0.1, seed=i % 7).name for i in range(70)]
    judged = []
    original = index_module._judge

    def stop_late(address, *rest):
        judged.append(address)
        if len(judged) == 66:
            raise KeyboardInterrupt
        return original(address, *rest)

    monkeypatch.setattr(index_module, "_judge", stop_late)
    with pytest.raises(KeyboardInterrupt):
        validate(names, tmp_path, tmp_path, threads=1)
    monkeypatch.setattr(index_module, "_judge", original)
    # The middle of a character, such as a disk that is full leaves.
    with open(tmp_path / "index.jsonl", "ab") as file:
        file.write('{"address": "half a lé'.encode()[:-1])
    with pytest.raises(ValueError, match=r"index.jsonl, line 66: not JSON .*; run `step-megatron data validate` again"):
        AudioIndex.load(tmp_path)
    report = validate(names, tmp_path, tmp_path, threads=1)
    assert report.read == 70 - 65 and report.valid == 70
    assert [clip.address for clip in AudioIndex.load(tmp_path)] == names


def test_an_index_moves_with_its_folder_and_takes_addresses_in_any_form(tmp_path):
    home = tmp_path / "home"
    write_voice(home / "audio" / "a.wav", 0.5)
    write_voice(tmp_path / "outside.wav", 0.4)
    validate(["audio/a.wav", str(tmp_path / "outside.wav")], home, home, threads=1)
    validate([AudioAddress(str(home / "audio/a.wav"))], home, threads=1)
    index = AudioIndex.load(home / "index.jsonl")
    assert len(index) == 2 and index["audio/a.wav"] is index[AudioAddress(str(home / "audio/a.wav"))]
    home.rename(tmp_path / "moved")
    moved = AudioIndex.load(tmp_path / "moved")
    assert moved["audio/a.wav"].num_samples == 8000 and moved[str(tmp_path / "outside.wav")].num_samples == 6400
    assert moved.resolve("audio/a.wav").read() == (tmp_path / "moved/audio/a.wav").read_bytes()


def test_tar_members_and_byte_ranges_are_validated_alike(tmp_path):
    import tarfile

    write_voice(tmp_path / "a.wav", 0.5)
    data = (tmp_path / "a.wav").read_bytes()
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "a.wav", "x/a.wav")
    (tmp_path / "s.bin").write_bytes(b"12345" + data + b"678")
    addresses = ["a.wav", "s.tar::x/a.wav", f"s.bin@5+{len(data)}"]
    validate(addresses, tmp_path, tmp_path, threads=1)
    index = AudioIndex.load(tmp_path)
    assert {index[address].sha256 for address in addresses} == {hashlib.sha256(data).hexdigest()}


def test_shards_stand_for_all_their_clips(tmp_path):
    import tarfile

    write_voice(tmp_path / "a.wav", 0.5)
    (tmp_path / "a.json").write_text("{}")
    for shard in range(2):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as archive:
            for name in ("a.wav", "a.json"):
                archive.add(tmp_path / name, f"{shard}{name}")
    assert validate(["s-{0..1}.tar"], tmp_path, tmp_path, threads=1).valid == 2
    assert [clip.address for clip in AudioIndex.load(tmp_path)] == ["s-0.tar::0a.wav", "s-1.tar::1a.wav"]


def test_a_tar_member_whose_name_is_not_utf8_is_quarantined(tmp_path):
    import tarfile

    write_voice(tmp_path / "a.wav", 0.5)
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        archive.add(tmp_path / "a.wav", "bad-é.wav")
        archive.add(tmp_path / "a.wav", "good.wav")
    for _ in range(2):
        report = validate(["s.tar"], tmp_path, tmp_path, quarantine_limit=0.5, threads=1)
        assert (report.total, report.valid, report.kinds) == (2, 1, {"unreadable": 1})
        entries = quarantine(tmp_path)
        assert list(entries) == ["s.tar::bad-\\xe9.wav"] and "not UTF-8" in entries["s.tar::bad-\\xe9.wav"]["reason"]
    assert [clip.address for clip in AudioIndex.load(tmp_path)] == ["s.tar::good.wav"]


def test_a_tar_member_of_the_index_is_read_without_the_tars_own_index(tmp_path, monkeypatch):
    import tarfile

    write_voice(tmp_path / "a.wav", 0.5)
    for name in ("x.wav", "y.wav"):
        with tarfile.open(tmp_path / "s.tar", "a") as archive:
            archive.add(tmp_path / "a.wav", name)
    validate(["s.tar"], tmp_path, tmp_path, threads=1)
    index = AudioIndex.load(tmp_path)
    place = index.resolve("s.tar::y.wav")
    assert (place.name, str(place)) == ("y.wav", f"{tmp_path}/s.tar::y.wav")
    with monkeypatch.context() as without:
        without.setattr(tar_index, "open_tar_index", lambda path: pytest.fail("opened"))
        assert place.read() == (tmp_path / "a.wav").read_bytes()
    # In another tar of that name the member lies elsewhere.
    write_voice(tmp_path / "b.wav", 0.7)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "b.wav", "y.wav")
    assert index.resolve("s.tar::y.wav").read() == (tmp_path / "b.wav").read_bytes()


def test_an_index_of_clips_that_a_run_would_refuse_names_the_longest(tmp_path):
    validate([write_voice(tmp_path / f"{i}.wav", 1.0 + i).name for i in range(3)], tmp_path, tmp_path, threads=1)
    index = AudioIndex.load(tmp_path)
    index.check_durations(3.0)
    with pytest.raises(ValueError, match=r"audio.max_clip_seconds is 2.5, and the index has 2.wav of 3.0 s; raise it"):
        index.check_durations(2.5)
    AudioIndex(tmp_path, [], {}).check_durations(1.0)


def test_a_damaged_index_names_file_and_line(tmp_path):
    write_voice(tmp_path / "a.wav", 0.5)
    validate(["a.wav"], tmp_path, tmp_path, threads=1)
    (tmp_path / "index.jsonl").write_text("{}x\n" + (tmp_path / "index.jsonl").read_text())
    with pytest.raises(ValueError, match=r"index.jsonl, line 1: .* delete the file"):
        AudioIndex.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="data validate"):
        AudioIndex.load(tmp_path / "elsewhere")
