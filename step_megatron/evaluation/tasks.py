"""Held-out items: what is asked, about which clip, and what the right answer is.

- `read_items`: test conversations with `meta.task` and `meta.answer` -> `Item`s, the last assistant turn taken off;
- `read_labels`: every (task, answer, clip) of the train split;
- `group_by_task`, `limit_items`: a deterministic subset of every task;
- `other_clip_donors`, `with_audio`: the control that asks the same question about another clip;
- `majority_label`, `training_task`: what the train split says about a task.

Four kinds of task: `classification` (a closed set of labels, about audio), `transcription`, `text_only` (no audio), and
`dialogue` (the last reply has a check, `meta.checks`).
"""

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from step_megatron.data.aspects import aspect_of
from step_megatron.data.schema import Audio, Conversation, read_conversations
from step_megatron.evaluation.scoring import normalise_label

TRANSCRIPTION, DIALOGUE = "transcription", "dialogue"
# `language_other_corpus` is tested on a corpus that training never saw: its train labels and train clips are those of `language`.
OTHER_CORPUS = "_other_corpus"


@dataclass(frozen=True)
class Item:
    """One held-out question.

    Attributes:
        conversation: up to the question: the last assistant turn, which holds the answer, is off.
        reasoning: the reference's reasoning, or None.
        audio: addresses of the clips in the conversation, in order.
        language: `meta.language`, two letters, or None.
        aspect: of a dialogue, as `aspects.aspect_of`.
        check: the JSON object of what the last reply must be (`data.checks`), or None.
    """

    id: str
    task: str
    answer: str
    conversation: Conversation
    reasoning: str | None
    audio: tuple[str, ...]
    language: str | None = None
    aspect: str = ""
    check: dict | None = None

    @property
    def question(self) -> str:
        """Text of the last human turn."""
        return next((turn.text.strip() for turn in reversed(self.conversation.turns) if turn.role == "human"), "")

    @property
    def kind(self) -> str:
        if self.check is not None:
            return DIALOGUE
        if not self.audio:
            return "text_only"
        return TRANSCRIPTION if self.task == TRANSCRIPTION else "classification"


@dataclass(frozen=True)
class Labelled:
    """One answer that the train split gives: `meta.task` and `meta.answer`, or one of several in `meta.labels`."""

    task: str
    answer: str
    audio: tuple[str, ...]


def to_item(conversation: Conversation, origin: str) -> Item:
    """Split a conversation into question and answer.

    Raises:
        ValueError: naming `origin`, the conversation and the field, if there is no `meta.task` or `meta.answer`, or if the last
            turn is not the assistant's.
    """
    for key in ("task", "answer"):
        if not str(conversation.meta.get(key, "")).strip():
            raise ValueError(
                f"{origin}: conversation {conversation.id!r} has no meta.{key}; evaluation needs it: add it to the line"
            )
    if not conversation.turns or conversation.turns[-1].role != "assistant":
        raise ValueError(f"{origin}: conversation {conversation.id!r} must end with the assistant turn that holds the answer")
    question = dataclasses.replace(conversation, turns=tuple(conversation.turns[:-1]))
    return Item(
        id=conversation.id,
        task=str(conversation.meta["task"]),
        answer=str(conversation.meta["answer"]),
        conversation=question,
        reasoning=conversation.turns[-1].reasoning,
        audio=question.audio_addresses(),
        language=conversation.meta.get("language"),
        aspect=aspect_of(conversation.meta),
        check=conversation.meta.get("checks", [None])[-1],
    )


def read_items(data_dir: Path) -> list[Item]:
    """Held-out items of `test.jsonl` and, where there is one, of `text_test.jsonl`; ids are unique over both.

    Raises:
        ValueError: naming the file and what to do (`SchemaError` where a file itself is not right).
    """
    items = [to_item(conversation, str(path)) for path in _files(data_dir, "test") for conversation in read_conversations(path)]
    repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{data_dir}: conversation id {repeated[0]!r} occurs more than once in the test files; make ids unique")
    return items


def read_labels(data_dir: Path) -> list[Labelled]:
    """Answers in `train.jsonl` and, where there is one, `text_train.jsonl`; conversations without labels are skipped.

    Raises:
        ValueError: as `read_items`, or for `meta.labels` that is not an object of strings.
    """
    labels = []
    for path in _files(data_dir, "train"):
        for conversation in read_conversations(path):
            meta = conversation.meta
            own = {meta["task"]: meta["answer"]} if "task" in meta and "answer" in meta else {}
            given = meta.get("labels", own)
            if not isinstance(given, dict) or not all(isinstance(answer, str) for answer in given.values()):
                raise ValueError(f'{path}: conversation {conversation.id!r}: meta.labels must be {{"TASK": "ANSWER", ...}}')
            labels += [Labelled(task, answer, conversation.audio_addresses()) for task, answer in given.items()]
    return labels


def _files(data_dir: Path, split: str) -> list[Path]:
    text = data_dir / f"text_{split}.jsonl"
    return [data_dir / f"{split}.jsonl", *([text] if text.is_file() else [])]


def group_by_task(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by task, tasks sorted by name, items in file order.

    Raises:
        ValueError: if a task has items of several kinds.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.task, []).append(item)
    for task, members in groups.items():
        if len({item.kind for item in members}) > 1:
            kinds = " and ".join(sorted({item.kind for item in members}))
            raise ValueError(f"task {task!r} mixes {kinds} items; give those of each kind a name of their own")
    return dict(sorted(groups.items()))


def limit_items(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """At most `limit` items, drawn without replacement, in file order; the draw depends on the seed and the ids alone."""
    if limit <= 0 or len(items) <= limit:
        return list(items)
    ordered = sorted(items, key=lambda item: item.id)
    kept = {item.id for item in random.Random(seed).sample(ordered, limit)}
    return [item for item in items if item.id in kept]


def other_clip_donors(labels: Sequence[str], seed: int) -> list[int] | None:
    """For every item the index of an item with another label, whose clip it is asked about.

    A permutation as long as no label has more than half of the items (then every clip is heard exactly once more); beyond that
    the surplus draws again from the other labels' clips.

    Returns:
        `donor[i]` with `labels[donor[i]] != labels[i]` for all i (labels compared normalised), or None if there is one label
        only.
    """
    names = [normalise_label(label) for label in labels]
    if len(set(names)) < 2:
        return None
    rng = random.Random(seed)
    n, largest = len(names), max(Counter(names).values())
    tie = {name: rng.random() for name in sorted(set(names))}
    order = sorted(range(n), key=lambda i: (tie[names[i]], names[i], rng.random()))
    # Sorted by label, a shift by the size of the largest group leaves every group.
    donor = [0] * n
    for place, i in enumerate(order):
        donor[i] = order[(place + largest) % n]
    for i in range(n):
        if names[donor[i]] == names[i]:
            donor[i] = rng.choice([j for j in range(n) if names[j] != names[i]])
    # The shift pairs a label with one other label; random swaps that keep the rule mix all of them.
    for _ in range(20 * n):
        i, j = rng.randrange(n), rng.randrange(n)
        if names[donor[j]] != names[i] and names[donor[i]] != names[j]:
            donor[i], donor[j] = donor[j], donor[i]
    return donor


def with_audio(conversation: Conversation, addresses: Sequence[str]) -> Conversation:
    """The same conversation about other clips: its k-th clip becomes `addresses[k % len(addresses)]`."""
    others = itertools.cycle(addresses)
    turns = tuple(
        dataclasses.replace(
            turn, content=tuple(Audio(next(others)) if isinstance(part, Audio) else part for part in turn.content)
        )
        for turn in conversation.turns
    )
    return dataclasses.replace(conversation, turns=turns)


def training_task(task: str, train_tasks: Iterable[str]) -> str:
    """Task whose train items speak for `task`: itself, or what stands before `_other_corpus`."""
    if task not in set(train_tasks) and task.endswith(OTHER_CORPUS):
        return task.removesuffix(OTHER_CORPUS)
    return task


def majority_label(answers: Iterable[str]) -> str | None:
    """The most frequent answer, normalised (ties go to the first in alphabetical order), or None of none."""
    counts = Counter(normalise_label(answer) for answer in answers)
    return min(counts, key=lambda name: (-counts[name], name)) if counts else None
