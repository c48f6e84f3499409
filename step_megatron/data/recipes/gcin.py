"""gcin-voice: Mandarin syllables by two speakers; the tone is the folder's last sign.

Folders are named in zhuyin with gcin's own tone digits: none is the first tone, 2, 3 and 4 the others, and **1 is the neutral
tone** (its thirteen folders are the particles: ba, me, de, ne, le, zhe, ...), which is left out, as are consonants without a
vowel. Splits are by the toneless syllable: no tone of a test syllable is heard in training.
"""

import re
from pathlib import Path

import soundfile

from step_megatron.data.recipes.clip import Clip, split_of

_ZHUYIN = "ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒㄓㄔㄕㄖㄗㄘㄙㄚㄛㄜㄝㄞㄟㄠㄡㄢㄣㄤㄥㄦㄧㄨㄩ"
_LETTERS = "b p m f d t n l g k h j q x zh ch sh r z c s a o e eh ai ei ao ou an en ang eng er i u v".split()
_SPELLING = dict(zip(_ZHUYIN, _LETTERS, strict=True))
# Sounds that gcin names by a consonant alone but that are no Mandarin syllable.
_CONSONANTS = set("ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎㄏㄐㄑㄒ")
_TONES = {"": "first", "2": "second", "3": "third", "4": "fourth"}
_LICENCES = {"3": "GPL-3 or LGPL-3", "5": "CC-BY-3.0"}


def clips(data_dir: Path, seed: int) -> list[Clip]:
    """All syllables with one of the four tones; [] when the corpus was not fetched."""
    root = data_dir / "sources/gcin/usr/share/gcin-voice/ogg"
    found = []
    for folder in sorted(root.glob("*")):
        match = re.fullmatch(r"([ㄅ-ㄩ]+)([2-4]?)", folder.name)
        if not match or match[1] in _CONSONANTS:
            continue
        zhuyin, tone = match[1], _TONES[match[2]]
        syllable = "".join(_SPELLING[sign] for sign in zhuyin)
        for file in sorted(folder.glob("*.ogg")):
            found.append(
                Clip(
                    id=f"gcin-{'_'.join(_SPELLING[sign] for sign in zhuyin)}{match[2] or 1}-{file.stem}",
                    corpus="gcin",
                    file=file,
                    seconds=soundfile.info(file).duration,
                    text=zhuyin,
                    group=f"syllable:{zhuyin}",
                    split=split_of(seed, f"syllable:{zhuyin}"),
                    labels={"tone": tone},
                    meta={
                        "language": "zh",
                        "syllable": syllable,
                        "speaker": f"gcin-{file.stem}",
                        "licence": _LICENCES[file.stem],
                        "confound": "two speakers, both also in train",
                    },
                )
            )
    return found
