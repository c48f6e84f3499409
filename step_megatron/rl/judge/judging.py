"""Judging pairs by any judge: both orders, retries, and what becomes of a judgment that fails.

    reward = phi((g1 - g2) / 2)        g1 of (response, reference), g2 of (reference, response)

With a judge that always prefers the first reply all rewards are zero, and the rate at which the orders disagree shows why. The
cheap mode asks in one order, drawn from the pair's id. An answer that is no verdict is asked for again with another seed, some
times; then the sample has **no** reward, and its tokens are left out of training. Too many of those end the run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from step_megatron.config.rl import JudgeConfig
from step_megatron.data.preferences import Verdict
from step_megatron.data.schema import Conversation
from step_megatron.errors import UserError
from step_megatron.rl.judge.prompt import Pair, build_prompt
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import VerdictError, parse_verdict
from step_megatron.runtime.seeds import derive


class JudgingError(UserError, RuntimeError):
    """So many judgments failed that the rewards mean nothing."""


@dataclass(frozen=True)
class Request:
    """One question to a judge.

    Attributes:
        prompt: system and human turn; what the judge writes next starts inside its thinking.
        pair, swapped: what the prompt was made of.
        seed: of the judge's sampling; it depends on pair, order and attempt alone.
    """

    prompt: Conversation
    pair: Pair
    swapped: bool
    seed: int


@dataclass(frozen=True)
class Answer:
    """What a judge wrote, from inside its thinking on; `text` is None where it could not be had, and `problem` says why."""

    text: str | None
    problem: str = ""


class Judge(Protocol):
    """Whoever answers: a server, a local model, a program. Implementations may be called from several threads."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. What the user can mend (a wrong key) is raised; the rest is an `Answer`'s problem."""
        ...


@dataclass(frozen=True)
class Judgment:
    """What came of one pair.

    Attributes:
        reward: -1 .. 1, above zero where the response is better than the reference; None where the judgment failed.
        straight, swapped: the verdicts in either order, both seen from the response; None where not asked for, or failed.
        failures: kind of every answer that was no verdict (`VerdictError.kind`, or `unanswered`), retried or not.
        cut: characters that the prompts left out.
    """

    pair: Pair
    reward: float | None
    straight: Verdict | None = None
    swapped: Verdict | None = None
    failures: tuple[str, ...] = ()
    cut: int = 0

    @property
    def orders_disagree(self) -> bool | None:
        """Whether the two orders favour different replies (a tie beside a preference counts); None where only one is known."""
        if self.straight is None or self.swapped is None:
            return None
        return _sign(self.straight.overall) != _sign(self.swapped.overall)


@dataclass
class _Question:
    """One order of one pair, until it is answered or given up."""

    pair: Pair
    is_swapped: bool
    prompt: Conversation
    verdict: Verdict | None = None
    failures: list[str] = field(default_factory=list)
    given_up: bool = False


def judge_pairs(pairs: Sequence[Pair], judge: Judge, settings: JudgeConfig, seed: int) -> list[Judgment]:
    """Judge pairs, in order; the judge sees as many at once as there are left to ask."""
    scale = Scale(settings.levels)
    by_pair = [_questions(pair, settings, seed, scale) for pair in pairs]
    for attempt in range(1 + settings.retries):
        open_ones = [q for questions in by_pair for q in questions if q.verdict is None and not q.given_up]
        if not open_ones:
            break
        requests = [_request(question, seed, attempt) for question in open_ones]
        for question, answer in zip(open_ones, judge.answer(requests), strict=True):
            _read(question, answer, scale)
    return [_conclude(questions, scale) for questions in by_pair]


def first_requests(pair: Pair, settings: JudgeConfig, seed: int) -> list[Request]:
    """What `judge_pairs` asks about a pair first: so that it may be asked beforehand."""
    return [_request(question, seed, 0) for question in _questions(pair, settings, seed, Scale(settings.levels))]


def summarise(judgments: Sequence[Judgment]) -> dict[str, float]:
    """Counts that ranks add up: `judged` and `masked` pairs, those asked in `both_orders`, of them those whose `orders_disagree`,
    those that were `cut`, and answers that were no verdict, `failed.KIND`."""
    counts = Counter(f"failed.{kind}" for judgment in judgments for kind in judgment.failures)
    known = [judgment.orders_disagree for judgment in judgments if judgment.orders_disagree is not None]
    return {
        "judged": len(judgments),
        "masked": sum(judgment.reward is None for judgment in judgments),
        "both_orders": len(known),
        "orders_disagree": sum(known),
        "cut": sum(judgment.cut > 0 for judgment in judgments),
        **counts,
    }


def check_failures(masked: float, judged: float, limit: float, example: str = "") -> None:
    """Stop where too many judgments failed; give counts of all ranks, so that all stop together.

    Raises:
        JudgingError: the share of masked samples is above `limit`.
    """
    if judged and masked / judged > limit:
        raise JudgingError(
            f"{masked:g} of {judged:g} judgments failed, more than rl.judge.failure_limit={limit:g}{example and f' ({example})'};"
            " look at the judge's answers: is it trained to write verdicts, does its context hold the prompts, is it up?"
        )


def _questions(pair: Pair, settings: JudgeConfig, seed: int, scale: Scale) -> list[_Question]:
    return [
        _Question(pair, swapped, build_prompt(pair, swapped, scale, settings.instructions, settings.max_characters))
        for swapped in _orders(pair, settings, seed)
    ]


def _request(question: _Question, seed: int, attempt: int) -> Request:
    name = (question.pair.id, int(question.is_swapped), attempt)
    return Request(question.prompt, question.pair, question.is_swapped, _seed(seed, *name))


def _orders(pair: Pair, settings: JudgeConfig, seed: int) -> tuple[bool, ...]:
    return (False, True) if settings.orders == "both" else (bool(_seed(seed, pair.id, "order") & 1),)


def _read(question: _Question, answer: Answer, scale: Scale) -> None:
    if answer.text is None:
        # The judge has tried again itself where that made sense.
        question.failures.append("unanswered")
        question.given_up = True
        return
    try:
        verdict = parse_verdict(answer.text, scale, len(question.pair.rubric))
    except VerdictError as error:
        question.failures.append(error.kind)
        return
    question.verdict = verdict.swapped() if question.is_swapped else verdict


def _conclude(questions: list[_Question], scale: Scale) -> Judgment:
    verdicts = {question.is_swapped: question.verdict for question in questions}
    answered = all(verdict is not None for verdict in verdicts.values())
    reward = scale.reward(sum(verdict.overall for verdict in verdicts.values()) / len(verdicts)) if answered else None
    failures = tuple(kind for question in questions for kind in question.failures)
    cut = max(question.prompt.meta["cut"] for question in questions)
    return Judgment(questions[0].pair, reward, verdicts.get(False), verdicts.get(True), failures, cut)


def _seed(seed: int, *names: str | int) -> int:
    # Servers and samplers take 31 bits.
    return derive(seed, "judge", *names) % 2**31


def _sign(level: int) -> int:
    return (level > 0) - (level < 0)
