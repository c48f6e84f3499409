"""Digests that are known of a checkpoint's files, and the check of the files against them.

sources.yaml                                       of a folder that `data fetch` unpacked (PINNED.json names its source)
.cache/huggingface/download/FILE.metadata          what `hf download --local-dir` was told by the hub
SHA256SUMS                                         lines of `digest  file`
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from step_megatron.conversion.sources import ConversionError
from step_megatron.data.fetch import catalogue
from step_megatron.data.fetch.download import sha256_of

SUMS = "SHA256SUMS"
_HUB = Path(".cache/huggingface/download")


@dataclass(frozen=True)
class Digest:
    """What a file should be: SHA-256, or git's digest of a small file (40 digits), and who says so."""

    hexadecimal: str
    said_by: str


def known_digests(directory: Path) -> dict[str, Digest]:
    """Digests by file name; none where nobody says any.

    Raises:
        ConversionError: a damaged SHA256SUMS.
    """
    known = {}
    for record in (directory / _HUB).glob("*.metadata"):
        # Commit, entity tag, time: the tag is the digest that the hub has of the file.
        _, tag, *_ = [*record.read_text(encoding="utf-8").splitlines(), "", ""]
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", tag):
            known[record.name.removesuffix(".metadata")] = Digest(tag, "the hub it was downloaded from")
    sums = directory / SUMS
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else (), 1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if line.strip() and not match:
            raise ConversionError(f"{sums}:{number}: not `digest  file`; correct it or remove it")
        if match:
            known[match[2]] = Digest(match[1].lower(), SUMS)
    pin = directory / "PINNED.json"
    if pin.is_file():
        source = catalogue.load()[0].get(json.loads(pin.read_text(encoding="utf-8"))["name"])
        known |= {name: Digest(digest, "sources.yaml") for name, digest in (source.output_sha256 if source else {}).items()}
    return known


def checked(file: Path, known: Digest | None) -> str:
    """SHA-256 of a file, which is what it should be where that is known.

    Raises:
        ConversionError: it is another.
    """
    digest = sha256_of(file)
    if known is None:
        return digest
    found = digest if len(known.hexadecimal) == 64 else _git_digest(file)
    if found != known.hexadecimal:
        raise ConversionError(f"{file}: its digest is {found}, {known.said_by} says {known.hexadecimal}: fetch it again")
    return digest


def _git_digest(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
