"""Clips and their measured facts -> conversations: a question, a short reasoning trace of measurements, the answer.

In training one clip may serve several turns, so that its audio tokens are paid for once; validation and test items are one
question each. Transcription never comes before language: the written words would give the language away and nobody would have to
listen.
"""

import random
from collections.abc import Iterator

from step_megatron.data.recipes.clip import Clip
from step_megatron.data.recipes.measure import Facts
from step_megatron.data.schema import Audio, Conversation, Text, Turn

QUESTIONS = {
    "language": ("Which language is this?", "Which language is spoken?", "Name the language."),
    "transcription": ("What is said?", "Write down the words.", "Which words are these?"),
    "gender": ("Male or female voice?", "Is the voice male or female?", "Is this a male or a female voice?"),
    "speaking_rate": ("Slow, normal or fast?", "Is the speech slow, normal or fast?", "How fast is the speech?"),
    "tone": ("Which tone is this?", "Which Mandarin tone is this?", "Name the tone."),
    "sound_event": ("What makes this sound?", "Which sound is this?", "Name the sound."),
}
# What is asked about a train clip of several tasks, with shares. In a conversation of two, no answer contains the later one.
# Transcripts are long: asked of every clip they would be most of what is trained, and a small model learns them by heart.
_ASKED = {
    "asterisk": ((("language",), 0.6), (("language", "transcription"), 0.3), (("transcription",), 0.1)),
    "espeak": (
        (("gender", "speaking_rate"), 0.35),
        (("speaking_rate", "gender"), 0.35),
        (("gender",), 0.15),
        (("speaking_rate",), 0.15),
    ),
}
_OTHER_CORPUS = "_other_corpus"


def question_task(task: str) -> str:
    """The task whose question is asked: `gender_other_corpus` is asked like `gender`."""
    return task.removesuffix(_OTHER_CORPUS)


def trace(task: str, facts: Facts, labels: dict[str, str]) -> str:
    """Reasoning about one question, made of measured facts; at most 24 tokens of Qwen's.

    Only transcription also names the language, which is known and not asked about there.
    """
    kind = question_task(task)
    start = f"{facts.seconds:.1f} s, "
    pitch = f"{facts.pitch_level} pitch"
    if kind == "tone":
        return f"{start}{pitch}, {facts.contour}"
    if kind == "speaking_rate":
        return f"{start}{facts.beats:.0f} beats a second"
    if kind == "transcription":
        return f"{start}{labels['language']}"
    if kind == "sound_event":
        return f"{start}{pitch}, {'voiced' if facts.voiced > 0.5 else 'noisy'}"
    return start + pitch


def training(clip: Clip, facts: Facts, rng: random.Random) -> Iterator[Conversation]:
    """Conversations about a train clip; `meta.task` is the first question's, `meta.labels` has all."""
    plans, shares = zip(*_ASKED.get(clip.corpus, ((tuple(clip.labels), 1.0),)), strict=True)
    tasks = list(rng.choices(plans, shares)[0])
    yield _conversation(clip, facts, tasks, [rng.choice(QUESTIONS[question_task(task)]) for task in tasks])


def items(clip: Clip, facts: Facts, tasks: list[str]) -> Iterator[Conversation]:
    """One held-out conversation a task, asked in the first phrasing."""
    for task in tasks:
        yield _conversation(clip, facts, [task], [QUESTIONS[question_task(task)][0]])


def _conversation(clip: Clip, facts: Facts, tasks: list[str], questions: list[str]) -> Conversation:
    turns = []
    for number, (task, question) in enumerate(zip(tasks, questions, strict=True)):
        content = (Text(question),) if number else (Audio(clip.address), Text(question))
        turns.append(Turn("human", content))
        turns.append(Turn("assistant", (Text(clip.labels[task]),), reasoning=trace(task, facts, clip.labels)))
    meta = {
        **clip.meta,
        "split": clip.split,
        "task": tasks[0],
        "answer": clip.labels[tasks[0]],
        "labels": {task: clip.labels[task] for task in tasks},
        "corpus": clip.corpus,
        "text": clip.text,
        "group": clip.group,
        "seconds": round(facts.seconds, 3),
        "pitch_hz": None if facts.pitch_hz is None else round(facts.pitch_hz, 1),
    }
    return Conversation(f"{clip.id}:{'+'.join(tasks)}", clip.corpus, tuple(turns), meta)
