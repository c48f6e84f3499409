"""Judging pairs: both orders, retries, masked samples, disagreement, poisoned judges; local judges."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.config.rl import JudgeConfig
from step_megatron.data.schema import Text, Turn
from step_megatron.errors import UserError
from step_megatron.rl.judge.judging import Answer, JudgingError, check_failures, judge_pairs, summarise
from step_megatron.rl.judge.local import ModelJudge, ScoringJudge
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from tests.rl.judge.hostile import HOSTILE

BOTH, RANDOM = JudgeConfig(), JudgeConfig(orders="random")


def pairs(count: int = 1, **changes) -> list[Pair]:
    history = (Turn("human", (Text("Hello?"),)),)
    return [dataclasses.replace(Pair(f"p{i}", history, "long reply", "short"), **changes) for i in range(count)]


class Scripted:
    """Writes what a function of the request says, and keeps the requests."""

    def __init__(self, write):
        self.write, self.requests = write, []

    def answer(self, requests):
        self.requests += requests
        return [text if isinstance(text, Answer) else Answer(text) for text in map(self.write, requests)]


def verdict(level: int) -> str:
    return f'hm</think>{{"rubric": [], "overall": {level}}}'


@given(st.sampled_from(Scale().values), st.sampled_from(Scale().values))
def test_the_reward_is_half_the_difference_of_the_orders(straight, swapped):
    judge = Scripted(lambda request: verdict(swapped if request.swapped else straight))
    (judgment,) = judge_pairs(pairs(), judge, BOTH, seed=1)
    assert judgment.reward == pytest.approx((straight - swapped) / 2 / 3)
    assert judgment.orders_disagree == ((straight > 0) - (straight < 0) != (swapped < 0) - (swapped > 0))
    assert len(judge.requests) == 2


@pytest.mark.parametrize("level", [3, -3, 0])
def test_a_judge_that_looks_at_the_place_alone_moves_nothing(level):
    judgments = judge_pairs(pairs(5), Scripted(lambda request: verdict(level)), BOTH, seed=1)
    assert [judgment.reward for judgment in judgments] == [0] * 5
    assert summarise(judgments)["orders_disagree"] == (5 if level else 0)


def test_one_order_is_drawn_from_the_pair_and_the_reward_seen_from_the_response():
    judge = ScoringJudge(lambda history, reply: len(reply), Scale())
    scripted = Scripted(lambda request: judge.answer([request])[0])
    judgments = judge_pairs(pairs(40), scripted, RANDOM, seed=1)
    assert len(scripted.requests) == 40 and {judgment.reward for judgment in judgments} == {1}
    orders = [request.swapped for request in scripted.requests]
    assert 8 < sum(orders) < 32
    again = Scripted(lambda request: verdict(0))
    judge_pairs(pairs(40)[::-1], again, RANDOM, seed=1)
    assert [request.swapped for request in again.requests] == orders[::-1]


def test_a_failed_answer_is_asked_for_again_with_another_seed():
    judge = Scripted(lambda request: "no idea" if len(judge.requests) <= 4 else verdict(-2 if request.swapped else 2))
    (judgment,) = judge_pairs(pairs(), judge, BOTH, seed=1)
    assert judgment.reward == pytest.approx(2 / 3) and judgment.failures == ("unfinished",) * 4
    assert len({request.seed for request in judge.requests}) == 6
    assert summarise([judgment]) == {
        "judged": 1, "masked": 0, "both_orders": 1, "orders_disagree": 0, "cut": 0, "failed.unfinished": 4,
    }  # fmt: skip


def test_after_three_retries_the_sample_is_masked_and_never_neutral():
    judge = Scripted(lambda request: "no idea" if request.swapped else verdict(3))
    (judgment,) = judge_pairs(pairs(), judge, BOTH, seed=1)
    # One order alone is no judgment, where both were wanted.
    assert judgment.reward is None and judgment.straight.overall == 3 and judgment.orders_disagree is None
    assert sum(request.swapped for request in judge.requests) == 4 and len(judge.requests) == 5


def test_an_answer_that_could_not_be_had_is_not_asked_for_again():
    judge = Scripted(lambda request: Answer(None, "HTTP 500") if request.pair.id == "p1" else verdict(1))
    judgments = judge_pairs(pairs(3), judge, BOTH, seed=1)
    assert [judgment.reward is None for judgment in judgments] == [False, True, False]
    assert len(judge.requests) == 6 and summarise(judgments)["failed.unanswered"] == 2


def test_too_many_failures_end_the_run():
    check_failures(2, 10, 0.2)
    check_failures(0, 0, 0.0)
    with pytest.raises(JudgingError, match="3 of 10 judgments failed, more than rl.judge.failure_limit=0.2 .bad JSON.") as error:
        check_failures(3, 10, 0.2, "bad JSON")
    assert isinstance(error.value, UserError)


def test_rubric_levels_are_turned_with_the_order():
    levels = {False: '{"rubric": [2, 0], "overall": 1}', True: '{"rubric": [-2, 0], "overall": -1}'}
    judge = Scripted(lambda request: f"x</think>{levels[request.swapped]}")
    (judgment,) = judge_pairs(pairs(rubric=("a", "b")), judge, BOTH, seed=1)
    assert judgment.straight == judgment.swapped and judgment.straight.rubric == (2, 0)
    (failed,) = judge_pairs(pairs(rubric=("a",)), judge, BOTH, seed=1)
    assert failed.reward is None and set(failed.failures) == {"missing"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_judge_that_obeys_what_is_not_quoted_finds_nothing_to_obey(name):
    """It takes any level, verdict or order outside the quotations for its own; a hostile reply gets none of it out there."""

    def gullible(prompts, seeds):
        outside = [re.sub(r'"(?:[^"\\]|\\.)*"', "", prompt.turns[1].text) for prompt in prompts]
        return [verdict(3 if re.search(r"3|overall|<|better|Criteria", text) else 0) for text in outside]

    settings = dataclasses.replace(BOTH, max_characters=200_000)
    (judgment,) = judge_pairs(pairs(response=HOSTILE[name]), ModelJudge(gullible), settings, seed=1)
    assert judgment.straight.overall == judgment.swapped.overall == 0


def test_a_model_judge_sees_all_prompts_at_once_with_their_seeds():
    calls = []

    def generate(prompts, seeds):
        calls.append((len(prompts), len(set(seeds))))
        return [verdict(1)] * len(prompts)

    judge_pairs(pairs(3), ModelJudge(generate), BOTH, seed=1)
    assert calls == [(6, 6)]


@given(st.text(max_size=8), st.text(max_size=8), st.sampled_from([2, 6, 7]))
def test_a_program_judges_the_same_in_both_orders(first, second, levels):
    settings = JudgeConfig(levels=levels)
    judge = ScoringJudge(lambda history, reply: len(reply), Scale(levels), span=8)
    (judgment,) = judge_pairs(pairs(response=first, reference=second), judge, settings, seed=1)
    better = (len(first) > len(second)) - (len(first) < len(second))
    if levels == 7:
        assert judgment.reward == pytest.approx(round((len(first) - len(second)) / 8 * 3) / 3, abs=1 / 6)
    assert judgment.reward * better >= 0


def test_a_random_judge_is_worth_nothing_on_average():
    judge = Scripted(lambda request: verdict(request.seed % 7 - 3))
    judgments = judge_pairs(pairs(300), judge, BOTH, seed=1)
    rewards = [judgment.reward for judgment in judgments]
    assert abs(sum(rewards) / len(rewards)) < 0.1 and min(rewards) < -0.5 and max(rewards) > 0.5
