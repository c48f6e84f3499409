"""Constructed preferences over the clips of the open-speech data set: which reply is better is known by construction.

A reply is right or wrong, and is a `sentence` or the `bare` answer. Hence the levels:

- without a rubric: three for being right; where both are, or neither is, one for being a sentence;
- with one: three for each criterion that one reply meets and the other does not, and overall their mean. Criteria ask for the
  right answer, a sentence or the bare answer, so that the same two replies are judged one way or the other.

A wrong reply has another answer of the same task and split. Forms are drawn evenly, apart from rightness, so a longer reply
wins about as often as it loses. The reasoning is what each reply says, the measured facts and the answer, and who is right,
in this order: a small model that wrote the answer first seemed to take it for what the replies say (read in its samples, not
tested). Every task has as many records; a task with few clips is asked about again, with other replies. Transcription is left
out: a judge that learnt from an hour of speech does not hear the words. No audio is decoded: records name the clips that the
conversations name, and keep their split, so that no transcript is in two splits.
"""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from step_megatron.data.dialogues.phrases import sentence
from step_megatron.data.preferences import Preference, Verdict, moved, write_preferences
from step_megatron.data.recipes.conversations import question_task
from step_megatron.data.schema import SPLITS, Conversation, read_conversations

SOURCE = "constructed"
COUNTS = {"train": 1600, "validation": 100, "test": 200}
BEST = 3
_NOT_ASKED = ("transcription",)
CRITERIA = {
    "right": "Gives the right answer.",
    "sentence": "Answers in a sentence.",
    "bare": "Gives the bare answer.",
}
_RUBRICS = (("right",), ("right", "sentence"), ("right", "bare"), ("sentence",), ("bare",))
_FORMS = ("sentence", "bare")


@dataclasses.dataclass(frozen=True)
class Reply:
    """A constructed reply and what is known about it."""

    text: str
    right: bool
    form: str

    def meets(self, criterion: str) -> bool:
        return self.right if criterion == "right" else self.form == criterion


def build_preferences(data_set: Path, seed: int, counts: dict[str, int] | None = None) -> dict[str, int]:
    """Write `preferences/{train,validation,test}.jsonl` in the data set's folder; returns the number of records by split.

    Args:
        counts: records by split (default: `COUNTS`).

    Raises:
        SchemaError: a file of the data set is missing or broken.
    """
    folder = data_set / "preferences"
    folder.mkdir(exist_ok=True)
    written = {}
    for split in SPLITS:
        conversations = read_conversations(data_set / f"{split}.jsonl")
        records = list(preferences(conversations, (counts or COUNTS)[split], random.Random(f"{seed}:preferences:{split}")))
        moved_records = (dataclasses.replace(r, history=moved(r.history, data_set, folder)) for r in records)
        written[split] = write_preferences(folder / f"{split}.jsonl", moved_records)
    return written


def preferences(conversations: list[Conversation], count: int, rng: random.Random) -> Iterator[Preference]:
    """`count` records about the conversations of one split, each about one of their questions, tasks in turn."""
    asked = questions_by_task(conversations, rng)
    answers = {task: sorted({c.turns[place].text for c, place in questions}) for task, questions in asked.items()}
    for number in range(count if asked else 0):
        task = list(asked)[number % len(asked)]
        conversation, place = asked[task][number // len(asked) % len(asked[task])]
        yield _preference(task, conversation, place, answers[task], f"{conversation.id}:{place}:{number}", rng)


def questions_by_task(conversations: list[Conversation], rng: random.Random) -> dict[str, list[tuple[Conversation, int]]]:
    """Questions of each task that has several answers, shuffled: a conversation and the place of the right reply in its turns."""
    questions: dict[str, list[tuple[Conversation, int]]] = {}
    for conversation in conversations:
        # A conversation's questions are the keys of `labels`, in order, two turns each.
        for number, task in enumerate(conversation.meta["labels"]):
            if task not in _NOT_ASKED:
                questions.setdefault(question_task(task), []).append((conversation, 2 * number + 1))
    usable = {task: asked for task, asked in sorted(questions.items()) if len({c.turns[i].text for c, i in asked}) > 1}
    for asked in usable.values():
        rng.shuffle(asked)
    return usable


def plain_level(response: Reply, reference: Reply) -> int:
    """Level without a rubric: being right is worth more than any form."""
    if response.right != reference.right:
        return BEST if response.right else -BEST
    return response.meets("sentence") - reference.meets("sentence")


def rubric_levels(rubric: tuple[str, ...], response: Reply, reference: Reply) -> Verdict:
    """A level for each criterion, and their mean, rounded away from zero."""
    levels = tuple(BEST * (response.meets(name) - reference.meets(name)) for name in rubric)
    mean = sum(levels) / len(levels)
    return Verdict(levels, round(abs(mean) + 0.25) * (1 if mean > 0 else -1))


def _preference(
    task: str, conversation: Conversation, place: int, answers: list[str], name: str, rng: random.Random
) -> Preference:
    turn = conversation.turns[place]
    right = turn.text
    wrong = rng.choice([answer for answer in answers if answer != right])
    # In two pairs of three one reply is wrong.
    rights = rng.choice(((True, True), (True, False), (False, True), (False, False), (True, False), (False, True)))
    forms = rng.choice(_FORMS), rng.choice(_FORMS)
    answers = [right if is_right else wrong for is_right in rights]
    response, reference = (
        Reply(sentence(task, answer) if form == "sentence" else answer, is_right, form)
        for answer, is_right, form in zip(answers, rights, forms, strict=True)
    )
    rubric = rng.choice(_RUBRICS) if rng.random() < 0.5 else ()
    verdict = rubric_levels(rubric, response, reference) if rubric else Verdict((), plain_level(response, reference))
    said = [f"{{response}}: {answers[0]}, {response.form}", f"{{reference}}: {answers[1]}, {reference.form}"]
    measured = f"{turn.reasoning}: " if turn.reasoning else ""
    right_ones = {(True, True): "both", (True, False): "{response}", (False, True): "{reference}", (False, False): "neither"}
    reasoning = "\n".join((*said, measured + right, f"right: {right_ones[rights]}"))
    kept = {name: conversation.meta[name] for name in ("split", "text", "group") if name in conversation.meta}
    return Preference(
        id=name,
        source=SOURCE,
        history=conversation.turns[:place],
        response=response.text,
        reference=reference.text,
        reference_from="data",
        rubric=tuple(CRITERIA[name] for name in rubric),
        verdict=verdict,
        reasoning=reasoning,
        meta={**kept, "task": task, "answer": right},
    )
