"""The phase of an iteration that judges: replies -> judgments -> one score a sample, and what the prompts' pass rates were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.rl.judge.judging import Judgment, check_failures
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.rewards import KINDS, Rewards, Sample, Scores, final_reply
from step_megatron.rl.rollout import Rollout

if TYPE_CHECKING:
    from step_megatron.rl.loop import PPO

_JUDGED = ("preference", "rubric")


def pair_of(rollout: Rollout, rewards: Rewards) -> Pair | None:
    """What a judge is asked about a sample; None where its prompt has no reference, or no reward wants a judgment of its kind."""
    prompt = rollout.prompt
    wanted = "rubric" if prompt.rubric else "preference"
    if prompt.reference is None or wanted not in {reward.kind for reward in rewards.rewards}:
        return None
    return Pair(rollout.id, prompt.history, final_reply(rollout.text), prompt.reference, prompt.rubric)


def needs_judge(rewards: Rewards) -> bool:
    """Whether some reward is a judgment's."""
    return any(reward.kind in _JUDGED for reward in rewards.rewards)


def judge(ppo: PPO, rollouts: Sequence[Rollout]) -> list[Judgment | None]:
    """A judgment of every sample that has something to be judged against.

    Raises:
        JudgingError: too many failed; on every rank.
    """
    pairs = [pair_of(rollout, ppo.rewards) for rollout in rollouts]
    asked = [pair for pair in pairs if pair is not None]
    if ppo.judging is None or not asked:
        return [None] * len(rollouts)
    judgments = ppo.judging.finish(asked)
    failed = [judgment for judgment in judgments if judgment.reward is None]
    example = f"{failed[0].pair.id}: {', '.join(failed[0].failures)}" if failed else ""
    check_failures(len(failed), len(judgments), ppo.config.rl.judge.failure_limit, example)
    told = iter(judgments)
    return [None if pair is None else next(told) for pair in pairs]


def reward(ppo: PPO, prompts: Sequence[RLPrompt], rollouts: Sequence[Rollout], judgments: Sequence[Judgment | None]) -> Scores:
    """One score a sample; the sampler learns the prompts' pass rates."""
    samples = [sample_of(rollout, judgment) for rollout, judgment in zip(rollouts, judgments, strict=True)]
    scores = ppo.rewards(samples)
    ppo.prompts.tell(prompts, pass_rates(samples, rollouts, len(prompts), ppo), ppo.iteration)
    return scores


def sample_of(rollout: Rollout, judgment: Judgment | None) -> Sample:
    """A response with what it can be rewarded for."""
    prompt = rollout.prompt
    tokens = len(rollout.generation.tokens)
    return Sample(rollout.id, rollout.text, tokens, judgment, prompt.answer, prompt.check, prompt.choices)


def pass_rates(samples: Sequence[Sample], rollouts: Sequence[Rollout], prompts: int, ppo: PPO) -> list[float | None]:
    """Share of each prompt's samples whose verifiable reward (else whose judgment) reaches the threshold."""
    passed: list[list[bool]] = [[] for _ in range(prompts)]
    threshold = ppo.config.rl.curriculum.threshold
    for sample, rollout in zip(samples, rollouts, strict=True):
        kind = "verifiable" if sample.answer is not None else "preference"
        value = KINDS["verifiable"].value(sample, None) if kind == "verifiable" else sample.judgment and sample.judgment.reward
        if value is not None:
            passed[rollout.group].append(value >= threshold)
    return [sum(each) / len(each) if each else None for each in passed]
