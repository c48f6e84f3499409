"""A judge that is a program and goes by marks on the surface, in the place of a reward model.

It is not the judge that the studies measure by (`held_out`), and cruder: a mark is given in part, an answer counts as right
wherever its words stand, also among other answers, and a sentence is whatever looks like one.
"""

from collections.abc import Callable, Sequence

from step_megatron.data.checks import Check
from step_megatron.data.preferences import Verdict
from step_megatron.data.template import THINK_END
from step_megatron.rl.judge.judging import Answer, Request
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import write_verdict
from step_megatron.studies.prompts import BARE, RIGHT

# A reply and the answer that is right -> how far the reply has the mark, 0 .. 1.
Mark = Callable[[str, str], float]


def _names(reply: str, answer: str) -> float:
    return float(Check((answer,)).content(reply))


def _sentence(reply: str, answer: str) -> float:
    words = reply.split()
    # No word twice: "The the language is is French." is none.
    return (reply[:1].isupper() + reply.endswith(".") + min(1.0, len(words) / 3) + len(set(words)) / max(1, len(words))) / 4


def _short(reply: str, answer: str) -> float:
    return 1 / max(1, len(reply.split()))


# Criterion -> mark.
MARKS: dict[str, Mark] = {RIGHT: _names, BARE: _short}


class MarksJudge:
    """A judge (`judging.Judge`): how much more of the marks a reply has than the other. The references are right answers.

    Args:
        hears: whether it knows what the right answer is; without, plain preference goes by manner alone.
    """

    def __init__(self, scale: Scale, hears: bool = True):
        self._scale, self._plain = scale, (_names, _sentence) if hears else (_sentence,)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(f"{THINK_END}{write_verdict(self._verdict(request.pair, request.swapped))}") for request in requests]

    def _verdict(self, pair: Pair, swapped: bool) -> Verdict:
        marks = [MARKS[criterion] for criterion in pair.rubric] or self._plain
        answer = pair.reference
        differences = [mark(pair.response, answer) - mark(pair.reference, answer) for mark in marks]
        overall = self._level(sum(differences) / len(differences))
        verdict = Verdict(tuple(map(self._level, differences)) if pair.rubric else (), overall)
        return verdict.swapped() if swapped else verdict

    def _level(self, difference: float) -> int:
        return min(self._scale.values, key=lambda level: (abs(level - difference * self._scale.best), level))
