"""Sound events in broad classes: Tux Paint's animals, LMMS's drums, basses and instruments; labels from folder and file names.

Each class comes from one collection, so recording style is a confound (`meta.confound`). Recordings that share a name stem or all
their bytes stay in one split.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile

from step_megatron.data.recipes import tuxpaint
from step_megatron.data.recipes.clip import Clip, split_of

# Long enough to know an instrument or an animal by.
_KEEP_SECONDS = 2.0
_SHORTEST = 0.1
_LMMS = {
    "drums": "drum",
    "beats": "drum",
    "basses": "bass",
    "bassloops": "bass",
    "stringsnpads": "instrument",
    "instruments": "instrument",
}


def clips(data_dir: Path, seed: int) -> list[Clip]:
    """All sound events, cut to two seconds; [] when neither collection was fetched."""
    found: list[Clip] = []
    contents: set[str] = set()
    for file, label, group, licence in [*_animals(data_dir), *_music(data_dir)]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            seconds = soundfile.info(file).duration
        except soundfile.LibsndfileError as error:
            print(f"sounds: left out, not readable: {error}", file=sys.stderr)
            continue
        if digest in contents or seconds < _SHORTEST:
            continue
        contents.add(digest)
        found.append(
            Clip(
                id="snd-" + re.sub(r"[^\w-]", "_", f"{group}-{file.stem}"),
                corpus="sounds",
                file=file,
                seconds=seconds,
                text="",
                group=f"sound:{group}",
                split=split_of(seed, f"sound:{group}"),
                labels={"sound_event": label},
                meta={"name": file.stem, "licence": licence, "confound": "each class comes from one collection"},
                cut=_KEEP_SECONDS,
            )
        )
    return found


def _animals(data_dir: Path) -> Iterator[tuple[Path, str, str, str]]:
    root = tuxpaint.root(data_dir) / "animals"
    for file in sorted(root.rglob("*.ogg")):
        if "_desc" not in file.stem:
            # `pig`, `pig_golden` and `pig_golden2` are one recording or takes of one.
            yield file, "animal", re.match(r"[a-z]+", file.stem.lower())[0], "GPL-2+"


def _music(data_dir: Path) -> Iterator[tuple[Path, str, str, str]]:
    root = data_dir / "sources/lmms/usr/share/lmms/samples"
    for folder, label in _LMMS.items():
        for file in sorted((root / folder).glob("*.ogg")):
            yield file, label, f"{folder}-{file.stem}", "GPL-2+"
