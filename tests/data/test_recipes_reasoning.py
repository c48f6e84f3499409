"""Text-only reasoning: every answer and every worked step is right by a solver that reads only the question."""

import ast
import itertools
import re
from fractions import Fraction

import pytest

from step_megatron.data.recipes.reasoning import TASKS, conversations

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COUNTS = {"train": 400, "validation": 40, "test": 80}


@pytest.fixture(scope="module", params=[1, 2, 3])
def made(request):
    return list(conversations(COUNTS, request.param, seed=5))


def of(made, task):
    return [c for c in made if c.meta["task"] == task]


def value(expression: str) -> Fraction:
    """Evaluate sums and differences of whole numbers by walking the syntax tree."""

    def walk(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
        left, right = walk(node.left), walk(node.right)
        return left + right if isinstance(node.op, ast.Add) else left - right

    return walk(ast.parse(expression, mode="eval").body)


def test_arithmetic(made):
    for c in of(made, "arithmetic"):
        question, steps, answer = c.turns[0].text, c.turns[1].reasoning.split("; "), c.turns[1].text
        expression = re.search(r"\d+(?: [+-] \d+)+", question)[0]
        assert value(expression) == int(answer) >= 0
        numbers = [int(n) for n in re.findall(r"\d+", expression)]
        running = numbers[0]
        for step, number in zip(steps, numbers[1:], strict=True):
            left, right = step.split(" = ")
            assert value(left) == int(right)
            # Each step takes the result of the last one and the next number of the question.
            assert [int(n) for n in re.findall(r"\d+", left)] == [running, number]
            running = int(right)
        assert running == int(answer)


def test_counting(made):
    pattern = (
        r"How many times is (\w+) in: (.+)\?|Count (\w+): (.+)\.|(?P<w3>.+)\. How many (?P<t3>\w+)\?"
        r"|In the list (?P<w4>.+), how often is (?P<t4>\w+)\?|How many (?P<t5>\w+) are in (?P<w5>.+)\?"
    )
    for c in of(made, "counting"):
        groups = re.fullmatch(pattern, c.turns[0].text)
        pairs = [(groups[1], groups[2]), (groups[3], groups[4])] + [(groups[f"t{i}"], groups[f"w{i}"]) for i in (3, 4, 5)]
        ((wanted, words),) = [pair for pair in pairs if pair[0]]
        assert words.split().count(wanted) == int(c.turns[1].text)
        steps = [step.split() for step in c.turns[1].reasoning.split(", ")]
        assert [word for word, _ in steps] == words.split()
        assert [int(n) for _, n in steps] == [words.split()[: i + 1].count(wanted) for i in range(len(steps))]


def test_dates(made):
    for c in of(made, "dates"):
        names = [name for name in DAYS + MONTHS if re.search(rf"\b{name}\b", c.turns[0].text)]
        assert len(names) == 1
        ring = DAYS if names[0] in DAYS else MONTHS
        ahead = int(re.search(r"\d+", c.turns[0].text)[0])
        assert ring[(ring.index(names[0]) + ahead) % len(ring)] == c.turns[1].text
        passed = c.turns[1].reasoning.split(", ")
        assert len(passed) == ahead + 1 and passed[0] == names[0] and passed[-1] == c.turns[1].text
        assert all(ring[(ring.index(a) + 1) % len(ring)] == b for a, b in itertools.pairwise(passed))


def test_web_of_lies(made):
    """The one assignment of true and false that agrees with every claim, found by trying all."""
    for c in of(made, "web_of_lies"):
        text = c.turns[0].text
        said = re.findall(r"(\w+) says that (\w+) (tells the truth|lies)\.", text)
        known = re.search(r"(?:^|\? )(\w+) (tells the truth|lies)\.", text)
        names = sorted({known[1], *(name for speaker, about, _ in said for name in (speaker, about))})
        fitting = []
        for values in itertools.product((False, True), repeat=len(names)):
            world = dict(zip(names, values, strict=True))
            told = all(world[speaker] == (world[about] == (what == "tells the truth")) for speaker, about, what in said)
            if told and world[known[1]] == (known[2] == "tells the truth"):
                fitting.append(world)
        assert len(fitting) == 1
        asked = re.search(r"(?:Does|Is what|Is) (\w+) (?:tell the truth|says the truth|truthful)\?", text)[1]
        assert c.turns[1].text == ("yes" if fitting[0][asked] else "no")
        steps = dict(step.split() for step in c.turns[1].reasoning.split(", "))
        assert steps == {name: str(truth).lower() for name, truth in fitting[0].items()}


def test_test_templates_problems_and_questions_are_held_out(made):
    by_split = {split: [c for c in made if c.meta["split"] == split] for split in COUNTS}
    assert all(by_split.values())
    templates = {split: {c.meta["template"] for c in members} for split, members in by_split.items()}
    assert not templates["test"] & (templates["train"] | templates["validation"])
    for key in (lambda c: c.turns[0].text, lambda c: (c.meta["task"], str(sorted(c.meta["problem"].items())))):
        sets = [{key(c) for c in members} for members in by_split.values()]
        assert all(not a & b for a, b in itertools.combinations(sets, 2))
    questions = [c.turns[0].text for c in made]
    assert len(set(questions)) == len(questions)


def test_all_tasks_in_every_split_and_no_answer_dominates(made):
    assert {(c.meta["split"], c.meta["task"]) for c in made} == {(split, task) for split in COUNTS for task in TASKS}
    for task in TASKS:
        answers = [c.turns[1].text for c in of(made, task) if c.meta["split"] == "train"]
        assert max(answers.count(answer) for answer in set(answers)) <= 0.6 * len(answers)


def test_the_same_seed_gives_the_same_and_another_another():
    first, again = (list(conversations(COUNTS, 1, seed=5)) for _ in range(2))
    assert first == again
    assert first != list(conversations(COUNTS, 1, seed=6))


def test_a_small_space_of_problems_ends_instead_of_repeating():
    made = list(conversations({"train": 20_000}, 1, seed=0))
    assert len(of(made, "dates")) < 1000 < len(of(made, "counting"))
