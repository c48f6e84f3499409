"""Debian packages in pure Python: the same files as dpkg-deb, hand-made archives, and members that would escape."""

import gzip
import io
import lzma
import shutil
import subprocess
import tarfile

import pytest

from step_megatron.data.fetch.deb import DebError, extract


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A tar of regular files and symbolic links, with leading `./` as dpkg writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return buffer.getvalue()


def ar_of(members: dict[str, bytes]) -> bytes:
    """The common ar format, written from its definition."""
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return out


def deb_of(files: dict[str, bytes], links: dict[str, str] | None = None, compression: str = "xz") -> bytes:
    compress = {"xz": lzma.compress, "gz": gzip.compress, "": bytes}[compression]
    suffix = f".{compression}" if compression else ""
    control = lzma.compress(tar_of({"./control": b"Package: x\n"}))
    # The control member has an odd length half of the time; the padding byte is part of the format.
    return ar_of({"debian-binary": b"2.0\n", "control.tar.xz": control, f"data.tar{suffix}": compress(tar_of(files, links))})


FILES = {
    "./usr/share/a/ㄅㄚ/3.ogg": b"first" * 1000,
    "./usr/share/a/deep/er/b.ogg": b"",
    "./usr/share/a/c.png": b"not wanted",
    "./usr/share/doc/x/copyright": b"free",
}


@pytest.mark.parametrize("compression", ["xz", "gz", ""])
def test_wanted_members_come_out_and_nothing_else(tmp_path, compression):
    package = tmp_path / "x.deb"
    package.write_bytes(deb_of(FILES, compression=compression))
    assert extract(package, ["usr/share/a/*.ogg", "usr/share/doc/*/copyright"], tmp_path / "out") == 3
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {name[2:]: content for name, content in FILES.items() if not name.endswith("png")}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not on this machine")
def test_reads_what_dpkg_deb_writes(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: d\n"
    (tree / "DEBIAN/control").write_text(control)
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    package = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "-Zxz", "--root-owner-group", "-b", tree, package], check=True, capture_output=True)
    subprocess.run(["dpkg-deb", "-x", package, tmp_path / "theirs"], check=True)
    extract(package, ["*"], tmp_path / "ours")

    def tree_of(root):
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    assert tree_of(tmp_path / "ours") == tree_of(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["../evil", "./usr/../../evil", "/evil", "./a\\..\\evil"])
def test_a_member_that_would_leave_the_destination_is_refused(tmp_path, name):
    package = tmp_path / "x.deb"
    package.write_bytes(deb_of({name: b"evil"}))
    with pytest.raises(DebError, match="outside"):
        extract(package, ["*"], tmp_path / "out" / "inner")
    assert not list(tmp_path.rglob("evil"))


def test_links_are_never_followed_or_written(tmp_path):
    package = tmp_path / "x.deb"
    outside = tmp_path / "outside"
    outside.mkdir()
    # A link to a directory outside, then a file "inside" it: the classic way out.
    package.write_bytes(deb_of({"./ok": b"1"}, links={"./door": str(outside)}))
    extract(package, ["*"], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ok"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04 a zip", "no ar magic"),
        (ar_of({"debian-binary": b"2.0\n"}), "no data.tar"),
        (ar_of({"debian-binary": b"2.0\n", "data.tar.zst": b"x"}), "data.tar.zst is not supported"),
        (ar_of({"data.tar.xz": b"not xz at all"}), "damaged"),
        (deb_of(FILES)[:-100], "damaged"),
        (b"!<arch>\n" + b"x" * 59, "broken ar header"),
        (ar_of({"data.tar.xz": b""}).replace(b"0         `", b"nine      `"), "is not a number"),
        (deb_of({"./other": b""}), "no file matches"),
    ],
)
def test_what_is_wrong_with_a_package_is_said_with_its_name(tmp_path, content, message):
    package = tmp_path / "broken.deb"
    package.write_bytes(content)
    with pytest.raises(DebError, match=message) as caught:
        extract(package, ["usr/*"], tmp_path / "out")
    assert "broken.deb" in str(caught.value)
