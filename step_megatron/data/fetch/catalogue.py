"""The pinned sources (`sources.yaml`) as typed values."""

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("sources.yaml")


@dataclass(frozen=True)
class Archive:
    """One file to download, and what to take out of it.

    location: a Debian pool path, or `name==version` for a wheel.
    members: shell patterns over paths (package), or member -> output file (wheel; two that name the same output are joined in
        order, and a member that ends in `/` stands for all files under it).
    """

    location: str
    size: int
    sha256: str
    members: list[str] | dict[str, str]

    @property
    def is_wheel(self) -> bool:
        return "==" in self.location

    @property
    def file_name(self) -> str:
        return self.location.replace("==", "-") + ".whl" if self.is_wheel else self.location.rsplit("/", 1)[1]


@dataclass(frozen=True)
class Source:
    """A data source: its archives, the directory it fills under the data directory, and digests of files it makes."""

    name: str
    licence: str
    destination: str
    archives: tuple[Archive, ...]
    output_sha256: dict[str, str]


def load(path: Path = FILE) -> tuple[dict[str, Source], dict[str, list[str]]]:
    """Return `(sources by name, group name -> source names)`."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    sources = {
        name: Source(
            name=name,
            licence=entry["licence"],
            destination=entry["destination"],
            archives=tuple(Archive(**archive) for archive in entry["archives"]),
            output_sha256=entry.get("output_sha256", {}),
        )
        for name, entry in tree["sources"].items()
    }
    return sources, tree["groups"]


def select(groups: list[str], path: Path = FILE) -> list[Source]:
    """The sources of `groups` (group or source names), each once, in order.

    Raises:
        ValueError: a name that is neither; it lists those that are.
    """
    sources, members = load(path)
    names: dict[str, None] = {}
    for group in groups:
        if group not in members and group not in sources:
            raise ValueError(f"unknown data group {group!r}; known groups: {', '.join(members)}; sources: {', '.join(sources)}")
        names |= dict.fromkeys(members.get(group, [group]))
    return [sources[name] for name in names]
