"""Asterisk telephone prompts: real speech in five languages with transcripts, 16 kHz g722.

One professional speaker a language, so that in this corpus language is speaker too, and the only male voice is Italian: the
conversations' `meta.confound` says so, and language and gender are also tested on other speakers (`tuxpaint.py`, `espeak.py`).
"""

import gzip
import re
from pathlib import Path

from step_megatron.data.recipes.clip import Clip, normalise, split_of

# Debian's own names of the voices: language and country, sex, name.
_SPEAKERS = {
    "en": ("en_US_f_Allison", "English", "female"),
    "es": ("es_MX_f_Allison", "Spanish", "female"),
    "fr": ("fr_CA_f_June", "French", "female"),
    "it": ("it_IT_m_Carlo", "Italian", "male"),
    "ru": ("ru_RU_f_IvrvoiceRU", "Russian", "female"),
}
_LICENCES = {"en": "CC-BY-SA-3.0", "es": "CC-BY-SA-3.0", "fr": "CC-BY-SA-3.0", "it": "CC-BY-3.0", "ru": "CC-BY-3.0"}
# g722 is 64 kbit/s.
_BYTES_PER_SECOND = 8000
# Brackets mark noises; a lone question mark or U+FFFD is a letter that upstream lost.
_UNUSABLE = re.compile(r"[\[\](){}<>�]|\w\?\w|\s\?\s")


def clips(data_dir: Path, seed: int) -> list[Clip]:
    """All prompts with a usable transcript; [] when the corpus was not fetched."""
    found = []
    for language, (speaker, name, gender) in _SPEAKERS.items():
        root = data_dir / "sources" / f"asterisk-{language}" / "usr/share"
        if not root.is_dir():
            continue
        package = f"asterisk-core-sounds-{language}"
        texts = read_transcripts(root / "doc" / package / f"core-sounds-{language}.txt.gz")
        base = root / "asterisk/sounds" / speaker
        for file in sorted(base.rglob("*.g722")):
            key = str(file.relative_to(base).with_suffix(""))
            text = texts.get(key, "")
            if not normalise(text) or _UNUSABLE.search(text) or key.startswith("silence/"):
                continue
            found.append(
                Clip(
                    id=f"ast-{language}-{key.replace('/', '-')}",
                    corpus="asterisk",
                    file=file,
                    seconds=file.stat().st_size / _BYTES_PER_SECOND,
                    text=text,
                    group=f"text:{normalise(text)}",
                    split=split_of(seed, normalise(text)),
                    labels={"language": name, "transcription": text},
                    meta={
                        "language": language,
                        "speaker": speaker,
                        "gender": gender,
                        "licence": _LICENCES[language],
                        "confound": "one speaker a language; only the Italian one is male",
                    },
                )
            )
    return found


def read_transcripts(path: Path) -> dict[str, str]:
    """Read `key: text` lines; some upstream lines repeat the key inside the text."""
    texts = {}
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        for line in file:
            if match := re.match(r"([\w./+-]+)\s*:\s*(.*)", line.strip()):
                texts[match[1]] = match[2].removeprefix(f"{match[1]}:").strip().strip('“”"').strip()
    return texts
