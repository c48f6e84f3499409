"""Sound events in broad classes: Tux Paint's animals, LMMS's drums and its music (basses, strings, other
instruments); labels from folder and file names.

Each class comes from one collection, so recording style is a confound (`meta.confound`). Recordings that share a name stem or all
their bytes stay in one split.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import soundfile

from step_megatron.data.recipes import tuxpaint
from step_megatron.data.recipes.clip import Clip, draw

# Long enough to know an instrument or an animal by.
_KEEP_SECONDS = 2.0
_SHORTEST = 0.1
_LMMS = {
    "drums": "drum",
    "beats": "drum",
    "basses": "music",
    "bassloops": "music",
    "stringsnpads": "music",
    "instruments": "music",
    "latin": "music",
}
# There are few recordings, so a third of them is held out, class by class.
_TEST, _VALIDATION = 0.25, 0.08


def clips(data_dir: Path, seed: int) -> list[Clip]:
    """All sound events, cut to two seconds; [] when neither collection was fetched."""
    found: list[Clip] = []
    contents: set[bytes] = set()
    for file, label, group in [*_animals(data_dir), *_music(data_dir)]:
        try:
            with soundfile.SoundFile(file) as sound:
                seconds = sound.frames / sound.samplerate
                start = sound.read(round(_KEEP_SECONDS * sound.samplerate))
        except soundfile.LibsndfileError as error:
            print(f"sounds: left out, not readable: {error}", file=sys.stderr)
            continue
        # Several files are the same recording, whole or at least in the part that is kept.
        digest = hashlib.sha256(start.tobytes()).digest()
        if digest in contents or seconds < _SHORTEST or not start.any():
            continue
        contents.add(digest)
        found.append(
            Clip(
                id="snd-" + re.sub(r"[^\w-]", "_", f"{label}-{group}-{file.stem}"),
                corpus="sounds",
                file=file,
                seconds=seconds,
                text="",
                group=f"sound:{group}",
                split="train",
                labels={"sound_event": label},
                meta={"name": file.stem, "licence": "GPL-2+", "confound": "each class comes from one collection"},
                cut=_KEEP_SECONDS,
            )
        )
    splits = _splits(found, seed)
    return [replace(clip, split=splits[clip.group]) for clip in found]


def _splits(clips: list[Clip], seed: int) -> dict[str, str]:
    """Split of each group, in the same proportions in every class."""
    splits = {}
    for label in sorted({clip.labels["sound_event"] for clip in clips}):
        groups = {clip.group for clip in clips if clip.labels["sound_event"] == label}
        for rank, group in enumerate(sorted(groups, key=lambda group: draw(seed, group))):
            share = rank / len(groups)
            splits[group] = "test" if share < _TEST else "validation" if share < _TEST + _VALIDATION else "train"
    return splits


def _animals(data_dir: Path) -> Iterator[tuple[Path, str, str]]:
    root = tuxpaint.root(data_dir) / "animals"
    for file in sorted(root.rglob("*.ogg")):
        if "_desc" not in file.stem:
            # `pig`, `pig_golden` and `pig_golden2` are one recording or takes of one.
            yield file, "animal", re.match(r"[a-z]+", file.stem.lower())[0]


def _music(data_dir: Path) -> Iterator[tuple[Path, str, str]]:
    root = data_dir / "sources/lmms/usr/share/lmms/samples"
    for folder, label in _LMMS.items():
        for file in sorted((root / folder).glob("*.ogg")):
            yield file, label, f"{folder}-{file.stem}"
