"""Addresses: files, tar members and byte ranges give exactly their bytes; tars are indexed once and can be resumed anywhere."""

import io
import os
import tarfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.audio import tar_index
from step_megatron.audio.address import AudioAddress, parse_address
from step_megatron.audio.errors import AudioError
from step_megatron.audio.tar_index import expand_shards, open_tar_index


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def header_only_tar(path, members):
    """A tar of empty members, written from one header whose name and checksum are patched: 100,000 in a second."""
    template = bytearray(tarfile.TarInfo("member-000000.wav").tobuf(tarfile.USTAR_FORMAT))
    template[148:156] = b" " * 8
    template[7:13] = bytes(6)
    base = sum(template)
    with open(path, "wb") as file:
        for number in range(members):
            digits = b"%06d" % number
            template[7:13] = digits
            template[148:156] = b"%06o\0 " % (base + sum(digits))
            file.write(template)
        file.write(bytes(1024))
    return path


@given(st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=20), st.integers(0, 10**12), st.integers(1, 10**9))
def test_the_text_form_reads_back(member, offset, size):
    for address in (
        AudioAddress("/a/x.tar", member=member),
        AudioAddress("/a/b c.bin", offset=offset, size=size),
        AudioAddress("/a/c.wav"),
    ):
        assert parse_address(str(address), "/elsewhere") == address


def test_a_relative_path_is_taken_from_the_root():
    assert parse_address("audio/x.wav", "/data") == AudioAddress("/data/audio/x.wav")
    assert parse_address("s.tar::d/x.wav", "/data") == AudioAddress("/data/s.tar", member="d/x.wav")
    assert parse_address("../s.bin@10+20", "/data/sub") == AudioAddress("/data/s.bin", offset=10, size=20)


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("a.tar.gz::x.wav", "decompress"), ("a.tgz::x", "decompress"), ("a.bin@5+0", "size 0")]
)
def test_addresses_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_address(text)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_members_and_ranges_give_their_bytes(tmp_path, tar_format):
    contents = {f"folder/clip {i}.wav": os.urandom(700 * i + 1) for i in range(5)}
    if tar_format != tarfile.USTAR_FORMAT:
        contents["long/" * 40 + "Grüße.wav"] = b"a name beyond 100 bytes"
    shard = write_tar(tmp_path / "s.tar", contents.items(), tar_format)
    for name, content in contents.items():
        assert parse_address(f"s.tar::{name}", tmp_path).read() == content
    (tmp_path / "plain.wav").write_bytes(b"plain")
    assert parse_address("plain.wav", tmp_path).read() == b"plain"
    assert parse_address("plain.wav@1+3", tmp_path).read() == b"lai"
    assert len(open_tar_index(str(shard))) == len(contents)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.wav", "d/" * 60 + "a.wav", "d" * 90 + "/" + "b" * 60, "x" * 100, "Grüße.wav"])
def test_the_fast_scan_sees_what_tarfile_sees(tmp_path, tar_format, name):
    path = str(write_tar(tmp_path / "s.tar", [(name, b"12345"), ("b.wav", bytes(512)), ("c.wav", b"")], tar_format))
    plain = tar_index._scan_plain(path)
    assert plain in (None, tar_index._scan_any(path))
    assert plain is not None or len(name) > 100 or (tar_format == tarfile.PAX_FORMAT and not name.isascii())


def test_only_regular_members_count_and_the_later_of_two_wins(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for content in (b"old", b"newer"):
            member = tarfile.TarInfo("x.wav")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert parse_address("s.tar::x.wav", tmp_path).read() == b"newer"
    with pytest.raises(AudioError, match="missing"):
        parse_address("s.tar::folder", tmp_path).read()


def test_a_hundred_thousand_members_are_indexed_once_and_resumed_by_position(tmp_path, monkeypatch):
    shard = str(header_only_tar(tmp_path / "big.tar", 100_000))
    start = time.perf_counter()
    index = open_tar_index(shard)
    assert len(index) == 100_000 and time.perf_counter() - start < 10
    assert index.address(77_777) == AudioAddress(shard, member="member-077777.wav")
    assert index.span("member-000003.wav") == (3 * 512 + 512, 0)
    assert [position for position, _ in index.addresses(99_998)] == [99_998, 99_999]
    # A later process reads the sidecar: it never scans.
    tar_index._open.cache_clear()
    monkeypatch.setattr(tar_index, "_scan", lambda path: pytest.fail("scanned again"))
    assert list(open_tar_index(shard).addresses(50_000))[0] == (50_000, AudioAddress(shard, member="member-050000.wav"))


def test_a_changed_archive_or_a_damaged_sidecar_is_indexed_again(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [("a.wav", b"first")])
    assert parse_address("s.tar::a.wav", tmp_path).read() == b"first"
    write_tar(shard, [("b.wav", b"22"), ("a.wav", b"another")])
    os.utime(shard, ns=(1, 1))
    assert parse_address("s.tar::a.wav", tmp_path).read() == b"another"
    for damage in (b"{", b'{"version": 1}', b"\xff\xfe"):
        (tmp_path / "s.tar.index").write_bytes(damage)
        tar_index._open.cache_clear()
        assert parse_address("s.tar::a.wav", tmp_path).read() == b"another"


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", [("a.wav", b"first")])

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tar_index.tempfile, "mkstemp", refuse)
    assert parse_address("s.tar::a.wav", tmp_path).read() == b"first"
    assert not (tmp_path / "s.tar.index").exists()


def test_errors_name_the_file_and_the_kind(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.wav", b"x" * 5000)])
    (tmp_path / "short.bin").write_bytes(b"1234")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:2000])
    (tmp_path / "no.tar").write_bytes(b"this is not an archive" * 100)
    for text, kind, words in [
        ("none.wav", "missing", "none.wav"),
        ("none.tar::a.wav", "missing", "none.tar"),
        ("s.tar::b.wav", "missing", "'b.wav'"),
        ("short.bin@2+10", "truncated", "8 bytes"),
        ("cut.tar::a.wav", "corrupt", "cut.tar"),
        ("no.tar::a.wav", "corrupt", "not a readable"),
        (".", "unreadable", "directory"),
    ]:
        with pytest.raises(AudioError, match=words) as caught:
            parse_address(text, tmp_path).read()
        assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [
        ("s.tar", ["s.tar"]),
        ("s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
        ("audio__OP_0..2_CL_.tar", ["audio_0.tar", "audio_1.tar", "audio_2.tar"]),
        ("b{1..2}/s{0..1}.tar", ["b1/s0.tar", "b1/s1.tar", "b2/s0.tar", "b2/s1.tar"]),
    ],
)
def test_shard_patterns(pattern, shards):
    assert expand_shards(pattern) == shards


def test_a_backward_shard_range_is_refused():
    with pytest.raises(ValueError, match="backwards"):
        expand_shards("s-{5..3}.tar")
