"""Dialogues by aspect: each scenario draws clips, lets a user ask, and gives replies with the checks that they must pass.

What is right follows from the clips' facts alone. Where no wish was said, a reply is a sentence; reasoning states measurements.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from step_megatron.data.checks import Check
from step_megatron.data.dialogues.heard import Heard, Pool
from step_megatron.data.dialogues.phrases import (
    FORMATS,
    LANGUAGES,
    NAMES,
    NUMBERS,
    ONE_WORD,
    STYLES,
    TASK_QUESTIONS,
    Wish,
    about,
    sentence,
)
from step_megatron.data.schema import Audio, Text, Turn

NEXT = ("And this one?", "What about this one?", "Now this one.")


@dataclass
class Dialogue:
    """A dialogue in the making.

    Attributes:
        checks: one an assistant turn, None for a reply that is not held against anything.
        answer: what the last reply has to say, for controls and reports.
    """

    pool: Pool
    task: str
    turns: list[Turn] = field(default_factory=list)
    checks: list[Check | None] = field(default_factory=list)
    answer: str = ""

    def human(self, text: str, *clips: Heard) -> None:
        self.turns.append(Turn("human", (*(Audio(clip.address) for clip in clips), *([Text(text)] if text else []))))

    def reply(self, text: str, check: Check, answer: str, reasoning: str) -> None:
        self.turns.append(Turn("assistant", (Text(text),), reasoning=reasoning))
        self.checks.append(check)
        self.answer = answer

    def answers(self, clip: Heard, wish: Wish | None = None, task: str = "") -> None:
        """Reply to a question about one clip, as the user wishes it."""
        task = task or self.task
        fact = clip.facts[task]
        word = wish.word if wish else str
        others = tuple(word(label) for label in self.pool.labels(task) if label != fact.label)
        check = Check((word(fact.label),), others, form="sentence")
        if wish:
            check = Check((word(fact.label),), others, wish.form, wish.starts, wish.ends)
        text = wish.apply(task, fact.label) if wish else sentence(task, fact.label)
        self.reply(text, check, word(fact.label), fact.trace)

    def tells_about(self, clip: Heard, number: int, task: str = "") -> None:
        """Reply about one clip of two, naming it."""
        task = task or self.task
        fact = clip.facts[task]
        others = tuple(label for label in self.pool.labels(task) if label != fact.label)
        check = Check((NUMBERS[number], fact.label), (NUMBERS[1 - number], *others), form="sentence")
        self.reply(about(task, fact.label, number), check, fact.label, f"clip {NUMBERS[number]}: {fact.trace}")

    def question(self, rng: random.Random) -> str:
        return rng.choice(TASK_QUESTIONS[self.task])


def constraint(d: Dialogue, rng: random.Random) -> None:
    """A wish of the first turn holds in the third."""
    wish = rng.choice((*FORMATS, *STYLES, *LANGUAGES))
    first, second, third = d.pool.draw(rng, d.task, 3)
    d.human(f"{wish.text} {d.question(rng)}", first)
    d.answers(first, wish)
    for clip in (second, third):
        d.human(rng.choice(NEXT), clip)
        d.answers(clip, wish)


def context(d: Dialogue, rng: random.Random) -> None:
    """Two clips in two turns, then a question about both: the same, which is longer, or what the first one was."""
    first, second = d.pool.draw(rng, d.task, 2, different=rng.random() < 0.5)
    d.human(d.question(rng), first)
    d.answers(first)
    d.human(rng.choice(NEXT), second)
    d.answers(second)
    ask = rng.choice([_same, _longer, _first_again])
    ask(d, first, second)


def _same(d: Dialogue, first: Heard, second: Heard) -> None:
    a, b = (clip.facts[d.task].label for clip in (first, second))
    d.human(f"Is the {NAMES[d.task]} the same in both clips?")
    if a == b:
        d.reply(f"Yes, both times it is {a}.", Check(("yes", a), ("no",), form="sentence"), "yes", f"{a} and {b}")
    else:
        d.reply(f"No, it is {a} and then {b}.", Check(("no", a, b), ("yes",), form="sentence"), "no", f"{a} and {b}")


def _longer(d: Dialogue, first: Heard, second: Heard) -> None:
    number = int(second.seconds > first.seconds)
    d.human("Which of the two clips is longer?")
    check = Check((NUMBERS[number],), (NUMBERS[1 - number],), form="sentence")
    reasoning = f"{first.seconds:.1f} s and {second.seconds:.1f} s"
    d.reply(f"Clip {NUMBERS[number]} is longer.", check, NUMBERS[number], reasoning)


def _first_again(d: Dialogue, first: Heard, second: Heard) -> None:
    d.human(f"What was the {NAMES[d.task]} of clip one again?")
    d.tells_about(first, 0)


def content(d: Dialogue, rng: random.Random) -> None:
    """Two facts are asked for, and both have to be in the reply."""
    first, second = d.pool.draw(rng, d.task, 2)
    d.human(d.question(rng), first)
    d.answers(first)
    d.human(f"Name the {NAMES[d.task]} and the pitch of this one.", second)
    label, level = second.facts[d.task].label, second.facts["pitch"].label
    others = [name for task in (d.task, "pitch") for name in d.pool.labels(task) if name not in (label, level)]
    text = f"{sentence(d.task, label).removesuffix('.')}, and the pitch is {level}."
    trace = f"{second.facts[d.task].trace}; {second.facts['pitch'].trace}"
    d.reply(text, Check((label, level), tuple(others), form="sentence"), f"{label}, {level}", trace)


def _wished(wishes: tuple[Wish, ...]) -> Callable[[Dialogue, random.Random], None]:
    """A question, then one with a wish."""

    def scenario(d: Dialogue, rng: random.Random) -> None:
        first, second = d.pool.draw(rng, d.task, 2)
        wish = rng.choice(wishes)
        d.human(d.question(rng), first)
        d.answers(first)
        d.human(f"{d.question(rng)} {wish.text}", second)
        d.answers(second, wish)

    return scenario


def naturalness(d: Dialogue, rng: random.Random) -> None:
    """Replies are sentences that take up what was said before."""
    first, second = d.pool.draw(rng, d.task, 2, different=rng.random() < 0.5)
    a, b = (clip.facts[d.task].label for clip in (first, second))
    d.human(d.question(rng), first)
    d.answers(first)
    d.human(rng.choice(NEXT), second)
    linking = "Again, " if a == b else "This time, "
    text = sentence(d.task, b)
    others = tuple(label for label in d.pool.labels(d.task) if label != b)
    check = Check((b,), others, form="sentence", starts=linking)
    d.reply(f"{linking}{text[0].lower()}{text[1:]}", check, b, second.facts[d.task].trace)


def follow_up(d: Dialogue, rng: random.Random) -> None:
    """A short question that only the turn before explains."""
    clips = d.pool.draw(rng, d.task, 2, different=True)
    d.human(f"What is the {NAMES[d.task]} of clip one?", *clips)
    d.tells_about(clips[0], 0)
    if rng.random() < 0.5:
        d.human("And clip two?")
        d.tells_about(clips[1], 1)
    else:
        d.human("And its pitch?")
        d.tells_about(clips[0], 0, "pitch")


def clarification(d: Dialogue, rng: random.Random) -> None:
    """A question that fits both clips is asked back; the user says which he meant."""
    clips = d.pool.draw(rng, d.task, 2, different=True)
    d.human(f"What is the {NAMES[d.task]}?", *clips)
    asked = Check(("one", "two"), form="question")
    d.reply("Do you mean clip one or clip two?", asked, "which clip", "two clips, one question")
    if rng.random() < 0.5:
        number = rng.randrange(2)
        d.human(f"Clip {NUMBERS[number]}.")
        d.tells_about(clips[number], number)


def interruption(d: Dialogue, rng: random.Random) -> None:
    """The user cuts a reply off, or interrupts himself; only what he said last counts."""
    clips = d.pool.draw(rng, d.task, 2, different=True)
    number = rng.randrange(2)
    if rng.random() < 0.5:
        d.human(f"What is the {NAMES[d.task]} of both clips?", *clips)
        # As far as it got; it is context, and nothing to learn.
        d.turns.append(Turn("assistant", (Text(f"Clip {NUMBERS[1 - number]}"),), train=False))
        d.checks.append(None)
        d.human(f"Stop, only clip {NUMBERS[number]}.")
    else:
        d.human(f"What is the {NAMES[d.task]} of clip {NUMBERS[1 - number]}", *clips)
        d.human(f"no, wait, of clip {NUMBERS[number]}?")
    d.tells_about(clips[number], number)


def revision(d: Dialogue, rng: random.Random) -> None:
    """The user changes what he asked for: the clip, or the form of the reply."""
    clips = d.pool.draw(rng, d.task, 2, different=True)
    number = rng.randrange(2)
    d.human(f"What is the {NAMES[d.task]} of clip {NUMBERS[1 - number]}?", *clips)
    d.tells_about(clips[1 - number], 1 - number)
    if rng.random() < 0.5:
        d.human(f"Sorry, I meant clip {NUMBERS[number]}.")
        d.tells_about(clips[number], number)
    else:
        d.human("Sorry, I meant in one word.")
        d.answers(clips[1 - number], ONE_WORD)


# (aspect, kind) -> scenario.
SCENARIOS: dict[tuple[str, str], Callable[[Dialogue, random.Random], None]] = {
    ("continuity", "context"): context,
    ("continuity", "constraint"): constraint,
    ("instruction_following", "content"): content,
    ("instruction_following", "format"): _wished(FORMATS),
    ("instruction_following", "style"): _wished(STYLES),
    ("naturalness", ""): naturalness,
    ("interaction_awareness", "follow_up"): follow_up,
    ("interaction_awareness", "clarification"): clarification,
    ("interaction_awareness", "interruption"): interruption,
    ("interaction_awareness", "revision"): revision,
}
