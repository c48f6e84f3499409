"""Constructed preferences over the clips of the open-speech data set: which reply is better is known by construction.

A reply is right or wrong, and has one of three forms: a `sentence`, the `bare` answer, the answer in `markup`. Hence the levels:

- without a rubric: three for being right, and of forms a sentence before the bare answer before markup;
- with one: three for each criterion that one reply meets and the other does not, and overall their mean. Criteria ask for the
  right answer, a sentence, the bare answer or no markup, so that the same two replies are judged one way or the other.

A wrong reply has another answer of the same task and split (in transcription, what another clip says). Forms are drawn evenly,
apart from rightness, so a longer reply wins about as often as it loses. The reasoning is the measured facts and the answer, then
what each reply is. No audio is decoded: records name the clips that the conversations name, and keep their split, so that no
transcript is in two splits.
"""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

from step_megatron.data.preferences import Preference, Verdict, moved, write_preferences
from step_megatron.data.recipes.conversations import question_task
from step_megatron.data.schema import SPLITS, Conversation, read_conversations

SOURCE = "constructed"
COUNTS = {"train": 1600, "validation": 100, "test": 300}
BEST = 3
_SENTENCES = {
    "language": "The language is {}.",
    "transcription": "The words are: {}",
    "gender": "It is a {} voice.",
    "speaking_rate": "The speech is {}.",
    "tone": "It is the {} tone.",
    "sound_event": "It is a sound of {}.",
}
_MARKUP = ("**{}**", "# {}", "- {}\n- {}", "`{}`", '{{"answer": "{}"}}')
_FORM_RANK = {"sentence": 1, "bare": 0, "markup": -1}
CRITERIA = {
    "right": "Gives the right answer.",
    "sentence": "Answers in a sentence.",
    "bare": "Gives the bare answer, without a sentence.",
    "plain": "Has no markup.",
}
_RUBRICS = (("right",), ("right", "sentence"), ("right", "bare"), ("sentence",), ("bare",), ("right", "plain"), ("plain",))


@dataclasses.dataclass(frozen=True)
class Reply:
    """A constructed reply and what is known about it."""

    text: str
    right: bool
    form: str

    def meets(self, criterion: str) -> bool:
        return {"right": self.right, "plain": self.form != "markup"}.get(criterion, self.form == criterion)

    @property
    def description(self) -> str:
        return f"{'right' if self.right else 'wrong'}, {self.form}"


def build_preferences(data_set: Path, seed: int, counts: dict[str, int] | None = None) -> dict[str, int]:
    """Write `preferences/{train,validation,test}.jsonl` in the data set's folder; returns the number of records by split.

    Args:
        counts: wanted records by split (default: `COUNTS`); fewer where there are fewer questions.

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
    """Up to `count` records about the conversations of one split, each about one of their questions, tasks in turn."""
    questions: dict[str, list[tuple[Conversation, int]]] = {}
    for conversation in conversations:
        # A conversation's questions are the keys of `labels`, in order, two turns each.
        for number, task in enumerate(conversation.meta["labels"]):
            questions.setdefault(question_task(task), []).append((conversation, 2 * number + 1))
    answers = {task: sorted({c.turns[place].text for c, place in asked}) for task, asked in questions.items()}
    usable = {task: asked for task, asked in sorted(questions.items()) if len(answers[task]) > 1}
    for asked in usable.values():
        rng.shuffle(asked)
    rounds = max(map(len, usable.values()), default=0)
    order = [(task, asked[i]) for i in range(rounds) for task, asked in usable.items() if i < len(asked)]
    for task, (conversation, place) in order[:count]:
        yield _preference(task, conversation, place, answers[task], rng)


def plain_level(response: Reply, reference: Reply) -> int:
    """Level without a rubric: being right is worth more than any form."""
    difference = 3 * (response.right - reference.right) + _FORM_RANK[response.form] - _FORM_RANK[reference.form]
    return min(max(difference, -BEST), BEST)


def rubric_levels(rubric: tuple[str, ...], response: Reply, reference: Reply) -> Verdict:
    """A level for each criterion, and their mean, rounded away from zero."""
    levels = tuple(BEST * (response.meets(name) - reference.meets(name)) for name in rubric)
    mean = sum(levels) / len(levels)
    return Verdict(levels, round(abs(mean) + 0.25) * (1 if mean > 0 else -1))


def _preference(task: str, conversation: Conversation, place: int, answers: list[str], rng: random.Random) -> Preference:
    turn = conversation.turns[place]
    right = turn.text
    wrong = rng.choice([answer for answer in answers if answer != right])
    # In two pairs of three one reply is wrong.
    rights = rng.choice(((True, True), (True, False), (False, True), (False, False), (True, False), (False, True)))
    forms = rng.choice(list(_FORM_RANK)), rng.choice(list(_FORM_RANK))
    response, reference = (
        Reply(_write(task, form, right if is_right else wrong, rng), is_right, form)
        for is_right, form in zip(rights, forms, strict=True)
    )
    rubric = rng.choice(_RUBRICS) if rng.random() < 0.5 else ()
    verdict = rubric_levels(rubric, response, reference) if rubric else Verdict((), plain_level(response, reference))
    measured = f"{turn.reasoning}: " if turn.reasoning else ""
    reasoning = f"{measured}{right}. {{response}} {response.description}; {{reference}} {reference.description}"
    kept = {name: conversation.meta[name] for name in ("split", "text", "group") if name in conversation.meta}
    return Preference(
        id=f"{conversation.id}:{place}",
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


def _write(task: str, form: str, answer: str, rng: random.Random) -> str:
    if form == "bare":
        return answer
    template = _SENTENCES[task] if form == "sentence" else rng.choice(_MARKUP)
    return template.format(*[answer] * template.count("{}"))
