"""Tux Paint stamps: spoken descriptions by many volunteers (the other speakers for language), and sound effects.

Speech is used as test items only: it is the corpus that training never hears.
"""

import re
from collections import Counter
from pathlib import Path

import soundfile

from step_megatron.data.recipes.clip import Clip, draw, normalise

_LANGUAGES = {"en": "English", "es": "Spanish", "fr": "French", "ru": "Russian"}
# Opening a file to learn its length takes time, and the test wants some tens a language.
_ENOUGH = 200


def root(data_dir: Path) -> Path:
    """Directory of the stamps."""
    return data_dir / "sources/tuxpaint/usr/share/tuxpaint/stamps"


def clips(data_dir: Path, known_texts: set[str], seed: int) -> list[Clip]:
    """Spoken descriptions in the languages that Asterisk has too, all test; [] when the corpus was not fetched.

    Args:
        known_texts: normalised texts of the other corpora's train and validation clips; what says one of them is left out.
        seed: draws the clips, a few hundred a language.
    """
    found: list[Clip] = []
    opened = Counter()
    files = sorted(root(data_dir).rglob("*_desc*.ogg"))
    for file in sorted(files, key=lambda file: draw(seed, str(file.relative_to(root(data_dir))))):
        match = re.fullmatch(r"(.+)_desc(?:_([a-z]{2}))?", file.stem)
        language = (match[2] or "en") if match else ""
        if language not in _LANGUAGES or opened[language] >= _ENOUGH:
            continue
        text = read_description(file.with_name(match[1] + ".txt"), language)
        if not normalise(text) or normalise(text) in known_texts:
            continue
        opened[language] += 1
        name = str(file.relative_to(root(data_dir)).with_suffix("")).replace("/", "-")
        found.append(
            Clip(
                id="tux-" + re.sub(r"[^\w-]", "_", name),
                corpus="tuxpaint",
                file=file,
                seconds=soundfile.info(file).duration,
                text=text,
                group=f"text:{normalise(text)}",
                split="test",
                labels={"language_other_corpus": _LANGUAGES[language]},
                meta={
                    "language": language,
                    "speaker": "unknown volunteer",
                    "licence": "GPL-2+",
                    "confound": "recording conditions differ by language",
                },
            )
        )
    return found


def read_description(path: Path, language: str) -> str:
    """Text of a stamp: the first line is English, `LANG.utf8=` lines are the others; "" when there is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    if language == "en":
        return lines[0].strip() if lines else ""
    prefix = f"{language}.utf8="
    return next((line.removeprefix(prefix).strip() for line in lines[1:] if line.startswith(prefix)), "")
