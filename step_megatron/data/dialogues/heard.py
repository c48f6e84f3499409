"""What dialogues are about: the clips of the open-speech data set, each with the facts that are known or were measured of it."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from step_megatron.data.recipes.conversations import question_task
from step_megatron.data.recipes.measure import Facts
from step_megatron.data.schema import Conversation, read_conversations

# A model that starts from nothing does not transcribe, and a transcript gives its language away.
_NOT_ASKED = ("transcription",)


@dataclass(frozen=True)
class Fact:
    """A right answer, and the measurements that lead to it (the reasoning of the data set's own conversations)."""

    label: str
    trace: str


@dataclass(frozen=True)
class Heard:
    """A clip.

    Attributes:
        address: relative to the open-speech folder.
        facts: task -> fact.
        text, group: what must not be in two splits.
    """

    address: str
    corpus: str
    seconds: float
    facts: dict[str, Fact]
    text: str
    group: str
    licence: str


def read_clips(open_speech: Path, split: str) -> list[Heard]:
    """The clips of a split, in the order of its file.

    Raises:
        SchemaError: there is no such data set; or it is damaged.
    """
    by_address: dict[str, Heard] = {}
    for conversation in read_conversations(open_speech / f"{split}.jsonl"):
        heard = by_address.setdefault(conversation.audio_addresses()[0], _clip(conversation))
        replies = (turn for turn in conversation.turns if turn.role == "assistant")
        for (task, label), turn in zip(conversation.meta["labels"].items(), replies, strict=True):
            if task not in _NOT_ASKED:
                heard.facts[question_task(task)] = Fact(label, turn.reasoning or "")
    return [heard for heard in by_address.values() if heard.facts]


def _clip(conversation: Conversation) -> Heard:
    """A clip with the one fact that every clip with a pitch has."""
    meta = conversation.meta
    level = Facts(meta["seconds"], meta["pitch_hz"], 0.0, "none", 0.0).pitch_level
    facts = {} if level == "no" else {"pitch": Fact(level, f"{meta['seconds']:.1f} s, {meta['pitch_hz']:.0f} Hz")}
    return Heard(
        conversation.audio_addresses()[0], meta["corpus"], meta["seconds"], facts, meta["text"], meta["group"], meta["licence"]
    )


class Pool:
    """Clips to draw from, by task and label: labels are drawn first, so that no label is the likely one."""

    def __init__(self, clips: Iterable[Heard]):
        self._by_label: dict[str, dict[str, list[Heard]]] = {}
        for clip in clips:
            for task, fact in clip.facts.items():
                self._by_label.setdefault(task, {}).setdefault(fact.label, []).append(clip)
        # A task with one label asks nothing. Pitch is asked beside another task.
        self.tasks = sorted(task for task, labels in self._by_label.items() if len(labels) > 1 and task != "pitch")

    def labels(self, task: str) -> list[str]:
        """All labels of a task, sorted."""
        return sorted(self._by_label[task])

    def draw(self, rng: random.Random, task: str, count: int, different: bool = False) -> list[Heard]:
        """`count` different clips with the task's fact; of `different` labels, one each."""
        labels = rng.sample(self.labels(task), count) if different else [rng.choice(self.labels(task)) for _ in range(count)]
        drawn: list[Heard] = []
        for label in labels:
            drawn.append(rng.choice([clip for clip in self._by_label[task][label] if clip not in drawn]))
        return drawn
