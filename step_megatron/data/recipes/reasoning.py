"""Text-only procedural reasoning with worked steps: arithmetic, counting, dates, web of lies.

Every item is made from a drawn problem and a template that words it. A task's test templates are never used in train or
validation, and no question occurs in two splits. `difficulty` 1 is for models of a few million parameters (small numbers, short
traces); each further step makes numbers larger or chains longer.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from step_megatron.data.recipes.clip import draw
from step_megatron.data.schema import Conversation, Text, Turn

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_NAMES = ("Ann", "Ben", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal")
_THINGS = ("cat", "dog", "cup", "pen", "hat")


@dataclass(frozen=True)
class Problem:
    """A drawn problem: what the templates are filled with, the worked steps, the answer."""

    values: dict[str, str]
    steps: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of problems: how to draw one, and its wordings for training and for the test."""

    make: Callable[[random.Random, int], Problem]
    templates: tuple[str, ...]
    test_templates: tuple[str, ...]


def _arithmetic(rng: random.Random, difficulty: int) -> Problem:
    """A sum or difference chain: `difficulty` operations on numbers up to `10 + 10 * difficulty`, never below zero."""
    largest = 10 + 10 * difficulty
    total = rng.randint(0, largest)
    expression, steps = str(total), []
    for _ in range(difficulty):
        minus = rng.random() < 0.5 and total > 0
        number = rng.randint(1, total) if minus else rng.randint(1, largest)
        result = total - number if minus else total + number
        sign = "-" if minus else "+"
        steps.append(f"{total} {sign} {number} = {result}")
        expression += f" {sign} {number}"
        total = result
    return Problem({"expression": expression}, "; ".join(steps), str(total))


def _counting(rng: random.Random, difficulty: int) -> Problem:
    """How often a word occurs in a list of up to `4 + 2 * difficulty` words; the steps count up at each occurrence."""
    words = [rng.choice(_THINGS) for _ in range(rng.randint(3, 4 + 2 * difficulty))]
    wanted = rng.choice(_THINGS)
    count, steps = 0, []
    for word in words:
        count += word == wanted
        steps.append(f"{word} {count}")
    return Problem({"words": " ".join(words), "wanted": wanted}, ", ".join(steps), str(count))


def _dates(rng: random.Random, difficulty: int) -> Problem:
    """The weekday or month some steps ahead, at most `3 + 3 * difficulty`; the worked steps name each one passed."""
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    start, ahead = rng.randrange(len(names)), rng.randint(1, 3 + 3 * difficulty)
    passed = [names[(start + i) % len(names)] for i in range(ahead + 1)]
    plural = unit if ahead == 1 else unit + "s"
    return Problem({"unit": unit, "start": names[start], "ahead": f"{ahead} {plural}"}, ", ".join(passed), passed[-1])


def _web_of_lies(rng: random.Random, difficulty: int) -> Problem:
    """A chain of `1 + difficulty` people: the first is known, each next speaks about the one before."""
    names = rng.sample(_NAMES, 1 + difficulty)
    truthful = rng.random() < 0.5
    claims = [f"{names[0]} {'tells the truth' if truthful else 'lies'}."]
    steps = [f"{names[0]} {'true' if truthful else 'false'}"]
    for before, name in zip(names, names[1:], strict=False):
        says_truthful = rng.random() < 0.5
        claims.append(f"{name} says that {before} {'tells the truth' if says_truthful else 'lies'}.")
        truthful = says_truthful == truthful
        steps.append(f"{name} {'true' if truthful else 'false'}")
    return Problem({"claims": " ".join(claims), "last": names[-1]}, ", ".join(steps), "yes" if truthful else "no")


TASKS = {
    "arithmetic": Task(
        _arithmetic,
        ("What is {expression}?", "Compute {expression}.", "{expression} = ?", "Work out {expression}."),
        ("Give the value of {expression}.", "How much is {expression}?"),
    ),
    "counting": Task(
        _counting,
        ("How many times is {wanted} in: {words}?", "Count {wanted}: {words}.", "{words}. How many {wanted}?"),
        ("In the list {words}, how often is {wanted}?", "How many {wanted} are in {words}?"),
    ),
    "dates": Task(
        _dates,
        ("It is {start}. Which {unit} is it in {ahead}?", "Which {unit} is {ahead} after {start}?", "{start} plus {ahead}?"),
        ("It is {start}. Which {unit} comes {ahead} later?", "What {unit} is it {ahead} from {start}?"),
    ),
    "web_of_lies": Task(
        _web_of_lies,
        ("{claims} Does {last} tell the truth?", "{claims} Is {last} truthful?"),
        ("{claims} Is what {last} says the truth?", "Does {last} tell the truth? {claims}"),
    ),
}


def conversations(counts: dict[str, int], difficulty: int, seed: int) -> Iterator[Conversation]:
    """Make `counts` conversations by split, the four tasks in turn; `meta.template` and `meta.problem` say what each was made of.

    A question belongs to the split that its hash names, so small spaces of problems are shared out too; when a task's space is
    too small for what is asked, its remaining items are left out.
    """
    for split, count in counts.items():
        rng = random.Random(f"{seed}:reasoning:{split}")
        asked: set[str] = set()
        exhausted: set[str] = set()
        for number in range(count):
            name = list(TASKS)[number % len(TASKS)]
            drawn = None if name in exhausted else _draw_new(name, split, asked, difficulty, seed, rng)
            if drawn is None:
                exhausted.add(name)
                continue
            problem, template = drawn
            question = template.format(**problem.values)
            asked.add(question)
            meta = {"split": split, "task": name, "answer": problem.answer, "template": template, "problem": problem.values}
            reply = Turn("assistant", (Text(problem.answer),), reasoning=problem.steps)
            turns = (Turn("human", (Text(question),)), reply)
            yield Conversation(f"reasoning-{split}-{number:05d}", "reasoning", turns, {**meta, "difficulty": difficulty})


def _draw_new(
    name: str, split: str, asked: set[str], difficulty: int, seed: int, rng: random.Random
) -> tuple[Problem, str] | None:
    """A problem of this split in a wording that was not used yet, or None when 300 draws find none."""
    task = TASKS[name]
    for _ in range(300):
        problem = task.make(rng, difficulty)
        template = rng.choice(task.test_templates if split == "test" else task.templates)
        # The problem, not its wording, decides the split: a test problem is new in its numbers as well as in its words.
        if _split_of_problem(seed, name, problem) == split and template.format(**problem.values) not in asked:
            return problem, template
    return None


def _split_of_problem(seed: int, name: str, problem: Problem) -> str:
    percent = draw(seed, f"{name}:{sorted(problem.values.items())}") % 100
    return "train" if percent < 70 else "validation" if percent < 80 else "test"
