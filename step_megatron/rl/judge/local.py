"""Judges in this process: a model behind a `generate` function, and a program that scores replies."""

from collections.abc import Callable, Sequence

from step_megatron.data.preferences import Verdict
from step_megatron.data.schema import Conversation, Turn
from step_megatron.data.template import THINK_END
from step_megatron.rl.judge.judging import Answer, Request
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import write_verdict

# Prompts and a seed for each -> what the model writes after its `<think>`; None where that is not possible: the prompt is too
# long, or a clip of it cannot be read.
Generate = Callable[[Sequence[Conversation], Sequence[int]], Sequence[str | None]]
# History and reply -> how good the reply is.
Score = Callable[[tuple[Turn, ...], str], float]


class ModelJudge:
    """A judge from any function that completes conversations, such as the rollout engine's.

    Args:
        generate: called with all prompts at once, and a seed for each: an answer that is no verdict is asked for again with
            another one, which a greedy sampler would not notice.
    """

    def __init__(self, generate: Generate):
        self.generate = generate

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        texts = self.generate([request.prompt for request in requests], [request.seed for request in requests])
        problem = "its prompt is too long, or a clip of it cannot be read"
        return [Answer(text, "" if text is not None else problem) for text in texts]


class ScoringJudge:
    """A program as a judge: it scores both replies and writes the verdict that the difference means.

    For tests, and for win rates by somebody else than the judge that was trained against.

    Args:
        score: of a reply, without its reasoning.
        span: the difference of scores that is worth the best level; smaller ones are rounded to a level.
    """

    def __init__(self, score: Score, scale: Scale, span: float = 1.0):
        self.score, self.scale, self.span = score, scale, span

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(self._verdict(request)) for request in requests]

    def _verdict(self, request: Request) -> str:
        pair = request.pair
        difference = self.score(pair.history, pair.response) - self.score(pair.history, pair.reference)
        if request.swapped:
            difference = -difference
        wanted = difference / self.span * self.scale.best
        level = min(self.scale.values, key=lambda value: (abs(value - wanted), value))
        return f"{THINK_END}{write_verdict(Verdict((level,) * len(pair.rubric), level))}"
