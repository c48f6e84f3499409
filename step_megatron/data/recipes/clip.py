"""What every source of the open-data recipes hands over: clips with labels, and the rule that puts them into splits."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from step_megatron.data.schema import SPLITS

# Percent of texts, syllables and sounds in train and validation; the rest is test.
_TRAIN, _VALIDATION = 80, 10


@dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
        id: unique, plain ASCII; also its file name in `audio/<corpus>/`.
        corpus: the source's name.
        file: the encoded file.
        seconds: duration.
        text: what is said, "" where nothing is. Two clips that share a normalised text are never in two splits.
        group: what else must not be divided over splits (a syllable, a voice, a recording).
        labels: task -> right answer.
        meta: facts that go into the conversation: speaker, gender, licence, confounds.
        cut: seconds to keep from the start, None for all.
    """

    id: str
    corpus: str
    file: Path
    seconds: float
    text: str
    group: str
    split: str
    labels: dict[str, str]
    meta: dict[str, str] = field(default_factory=dict)
    cut: float | None = None

    @property
    def address(self) -> str:
        """Where the clip lies under the output directory; a cut clip is written as wav."""
        return f"audio/{self.corpus}/{self.id}{self.file.suffix if self.cut is None else '.wav'}"

    @property
    def kept_seconds(self) -> float:
        return self.seconds if self.cut is None else min(self.seconds, self.cut)


def normalise(text: str) -> str:
    """Text as compared between splits: NFC, lower case, words only."""
    text = unicodedata.normalize("NFC", text).lower()
    return " ".join(re.sub(r"[^\w' ]+", " ", text).split())


def draw(seed: int, key: str) -> int:
    """A number that depends on seed and key alone, to order and split things the same way on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big")


def split_of(seed: int, key: str) -> str:
    """Split of a text (or syllable, or recording): 80% train, 10% validation, 10% test of the keys."""
    percent = draw(seed, "split:" + key) % 100
    return "train" if percent < _TRAIN else "validation" if percent < _TRAIN + _VALIDATION else "test"


def choose(clips: Iterable[Clip], task: str, counts: dict[str, int], seconds: float, seed: int) -> list[Clip]:
    """Pick clips: in turn from every label of `task`, in a seeded order, so that no label crowds out another.

    Args:
        counts: wanted clips by split; fewer where the source has fewer.
        seconds: audio to use at most; test and validation are served first.
    """
    chosen: list[Clip] = []
    for split in reversed(SPLITS):
        by_label: dict[str, list[Clip]] = {}
        for clip in sorted(clips, key=lambda clip: draw(seed, clip.id)):
            if clip.split == split:
                by_label.setdefault(clip.labels[task], []).append(clip)
        queues = [by_label[label] for label in sorted(by_label)]
        # A rarer label ends first and the others go on.
        order = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
        for clip in order[: counts[split]]:
            if clip.kept_seconds > seconds:
                break
            seconds -= clip.kept_seconds
            chosen.append(clip)
    return chosen
