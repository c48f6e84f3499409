"""NeMo manifests: clips, tarred clips and parts of recordings become conversations; bad lines are refused by place and field."""

import json
import math
import tarfile

import numpy as np
import pytest
import soundfile

from step_megatron.audio.address import parse_address
from step_megatron.data.manifest import convert_manifest
from step_megatron.data.schema import Audio, SchemaError, Text, read_conversations

ASK = "Write down what is said."


def write(folder, *entries, name="manifest.json"):
    (folder / name).write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return folder / name


def test_plain_manifest(tmp_path):
    manifest = write(
        tmp_path,
        {"audio_filepath": "a/one.wav", "duration": 1.5, "text": "héllo", "lang": "fr", "speaker": "x"},
        {"audio_filepath": "/elsewhere/two.wav", "duration": 2, "text": "", "source_lang": "en"},
    )
    assert convert_manifest(manifest, tmp_path / "out.jsonl", ASK, "corpus") == 2
    one, two = read_conversations(tmp_path / "out.jsonl")
    assert one.id == "corpus-1" and one.source == "corpus"
    assert one.turns[0].content == (Audio("a/one.wav"), Text(ASK)) and one.turns[1].text == "héllo"
    assert one.meta == {"duration": 1.5, "speaker": "x", "task": "transcription", "answer": "héllo", "language": "fr"}
    assert two.audio_addresses() == ("/elsewhere/two.wav",) and two.meta["language"] == "en"


def test_addresses_are_found_from_another_folder(tmp_path):
    (tmp_path / "in").mkdir()
    manifest = write(tmp_path / "in", {"audio_filepath": "one.wav", "duration": 1, "text": "a"})
    convert_manifest(manifest, tmp_path / "one.jsonl", ASK, "c")
    assert read_conversations(tmp_path / "one.jsonl")[0].audio_addresses() == ("in/one.wav",)
    (tmp_path / "out").mkdir()
    convert_manifest(manifest, tmp_path / "out/one.jsonl", ASK, "c")
    assert read_conversations(tmp_path / "out/one.jsonl")[0].audio_addresses() == (str(tmp_path / "in/one.wav"),)


@pytest.mark.parametrize("pattern", ["audio_{shard}.tar", "audio__OP_0..3_CL_.tar", "audio_{0..3}.tar"])
def test_tarred_manifest_reads_the_right_bytes(tmp_path, pattern):
    for shard in (0, 3):
        with tarfile.open(tmp_path / f"audio_{shard}.tar", "w") as tar:
            for name in ("x.wav", "y-sub.wav"):
                (tmp_path / "member").write_bytes(f"{shard} {name}".encode())
                tar.add(tmp_path / "member", name)
    manifest = write(
        tmp_path,
        {"audio_filepath": "x.wav", "duration": 1, "text": "a", "shard_id": 0},
        {"audio_filepath": "x-sub1.wav", "duration": 1, "text": "b", "shard_id": 3},
        {"audio_filepath": "y-sub.wav@3", "duration": 1, "text": "c"},
    )
    convert_manifest(manifest, tmp_path / "out.jsonl", ASK, "c", tars=pattern)
    addresses = [conversation.audio_addresses()[0] for conversation in read_conversations(tmp_path / "out.jsonl")]
    assert addresses == ["audio_0.tar::x.wav", "audio_3.tar::x.wav", "audio_3.tar::y-sub.wav"]
    contents = [parse_address(address, tmp_path).read() for address in addresses]
    assert contents == [b"0 x.wav", b"3 x.wav", b"3 y-sub.wav"]


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_offset_cuts_the_part_sample_for_sample(tmp_path, subtype):
    ramp = np.arange(8000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", ramp if subtype == "PCM_16" else ramp / 32768, 8000, subtype)
    manifest = write(tmp_path, {"audio_filepath": "long.wav", "offset": 0.25, "duration": 0.5, "text": "a"})
    convert_manifest(manifest, tmp_path / "out.jsonl", ASK, "c")
    (address,) = read_conversations(tmp_path / "out.jsonl")[0].audio_addresses()
    assert address == "cut/c-1.wav"
    samples, rate = soundfile.read(tmp_path / address)
    assert rate == 8000 and np.array_equal(samples * 32768, ramp[2000:6000])


def test_the_first_part_is_cut_and_the_whole_is_not(tmp_path):
    """The first of several parts has offset 0; a rounded duration is still the whole recording."""
    ramp = np.arange(8000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", ramp, 8000)
    line = {"audio_filepath": "long.wav", "text": "a"}
    durations = [0.5, 1.0, 0.995, 1.004]
    manifest = write(
        tmp_path,
        *({**line, "offset": 0, "duration": duration} for duration in durations),
        {**line, "offset": 0.5, "duration": 0.501},
    )
    convert_manifest(manifest, tmp_path / "out.jsonl", ASK, "c")
    addresses = [conversation.audio_addresses()[0] for conversation in read_conversations(tmp_path / "out.jsonl")]
    assert addresses == ["cut/c-1.wav", "long.wav", "long.wav", "long.wav", "cut/c-5.wav"]
    for address, part in (("cut/c-1.wav", ramp[:4000]), ("cut/c-5.wav", ramp[4000:])):
        assert np.array_equal(soundfile.read(tmp_path / address, dtype="int16")[0], part)


def test_a_refused_manifest_leaves_no_cut_clips(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 8000)
    part = {**GOOD, "offset": 0.2, "duration": 0.5}
    with pytest.raises(SchemaError, match="manifest.json:2"):
        convert_manifest(write(tmp_path, part, {**GOOD, "text": 3}), tmp_path / "out.jsonl", ASK, "c")
    assert not (tmp_path / "cut").exists()
    convert_manifest(write(tmp_path, part), tmp_path / "out.jsonl", ASK, "c")
    before = (tmp_path / "cut/c-1.wav").read_bytes()
    with pytest.raises(SchemaError, match="manifest.json:2"):
        convert_manifest(write(tmp_path, {**part, "duration": 0.3}, {**GOOD, "text": 3}), tmp_path / "out.jsonl", ASK, "c")
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {"c-1.wav"}
    assert (tmp_path / "cut/c-1.wav").read_bytes() == before, "the clips of the JSONL that stands are as they were"


GOOD = {"audio_filepath": "a.wav", "duration": 1.0, "text": "a"}


@pytest.mark.parametrize(
    ("change", "tars", "message"),
    [
        ({"audio_filepath": None}, "", "field `audio_filepath` is None; write a string"),
        ({"text": 3}, "", "field `text` is 3; write a string"),
        ({"shard_id": 1}, "", "field `shard_id` says that this manifest is tarred"),
        ({}, "a_{shard}.tar", "field `shard_id` is None; a tarred manifest needs its number"),
        ({"offset": 0.5}, "", "field `audio_filepath`: .*a.wav cannot be cut .missing"),
        ({"offset": "x"}, "", "field `offset` is 'x'; write seconds"),
        ({"offset": math.nan}, "", "field `offset` is nan; write seconds"),
        ({"offset": 0, "duration": math.inf}, "", "field `duration` is inf; write seconds"),
        ({"audio_filepath": "b.wav", "offset": 1.0, "duration": 0.005}, "", "fields `offset` and `duration` ask for 1.0 s"),
        ({"snr": math.nan}, "", "NaN is not JSON"),
        ({"split": "dev"}, "", "field `meta.split` is 'dev'; write one of train"),
        ({"audio_filepath": "b.wav", "offset": 0.5}, "", "fields `offset` and `duration` ask for 0.5 s to 1.5 s of 1.0 s"),
        ({"audio_filepath": "manifest.json", "offset": 0.5}, "", "field `audio_filepath`: .*json cannot be cut"),
    ],
)
def test_bad_entries_are_refused_by_place_and_field(tmp_path, change, tars, message):
    soundfile.write(tmp_path / "b.wav", np.zeros(8000), 8000)
    manifest = write(tmp_path, GOOD, {**GOOD, **change} if not tars else GOOD)
    with pytest.raises(SchemaError, match=r"manifest.json:[12]: " + message):
        convert_manifest(manifest, tmp_path / "out.jsonl", ASK, "c", tars)
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_not_a_manifest_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="no such manifest"):
        convert_manifest(tmp_path / "no.json", tmp_path / "out.jsonl", ASK, "c")
    (tmp_path / "m.json").write_text("[1]\n")
    with pytest.raises(SchemaError, match="m.json:1: not a JSON object"):
        convert_manifest(tmp_path / "m.json", tmp_path / "out.jsonl", ASK, "c")
    (tmp_path / "m.json").write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xe9"}\n')
    with pytest.raises(SchemaError, match="m.json:2: not a JSON object in UTF-8"):
        convert_manifest(tmp_path / "m.json", tmp_path / "out.jsonl", ASK, "c")
    with pytest.raises(SchemaError, match="no place for the shard's number"):
        convert_manifest(tmp_path / "m.json", tmp_path / "out.jsonl", ASK, "c", tars="audio.tar")
