"""What an iteration is measured by; all of it is the same on every rank.

score                    mean of the trained samples; reward/KIND mean value of a kind, reward/KIND_failed its failures
kl, kl_per_token         of the policy from its reference (k1); beta its coefficient
entropy                  of the distributions that tokens were drawn from
response_tokens, cut     mean length, share that reached the longest
rollout/dlogp_mean, rollout/dlogp_max, rollout/dlogp_above_T, rollout/ratio
                         how far rollout engine and training forward differ about the same tokens (`ppo.mismatch`)
policy_loss, clip_fraction, approx_kl; value_loss, value_clip_fraction, explained_variance
actor/learning_rate, actor/grad_norm, critic/..., skipped_updates
judge/NAME               counts of `judge.judging.summarise` over the judged samples, as shares
seconds/PHASE, share/PHASE, memory_gib/PHASE
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from step_megatron.rl.judge.judging import Judgment, summarise
from step_megatron.rl.packed import masked_sum
from step_megatron.rl.ppo import explained_variance, mismatch
from step_megatron.rl.rewards import Rewards, Scores
from step_megatron.rl.rollout import Experience, Rollout

if TYPE_CHECKING:
    from step_megatron.rl.loop import PPO

_OF_VALUES = ("value_loss", "value_clip_fraction")
_OF_POLICY = ("policy_loss", "clip_fraction", "approx_kl")


class Measures:
    """Collects what the phases find.

    Attributes:
        kl: mean KL of a sample.
        entropy: `[tokens]`.
    """

    def __init__(self, rewards: Rewards, rollouts: Sequence[Rollout], judgments: Sequence[Judgment | None], scores: Scores):
        self._kinds = [reward.kind for reward in rewards.rewards]
        self.rollouts, self.judgments, self.scores = rollouts, judgments, scores
        self.kl = 0.0
        self.entropy: torch.Tensor | None = None

    def metrics(self, experience: Experience, ppo: PPO) -> dict[str, float]:
        """Everything, when the iteration's training is over; starts the learners' sums anew."""
        return self._of_samples() | self._of_tokens(experience, ppo) | self._of_learning(ppo)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every sample as people read it."""
        for rollout, judgment, score in zip(self.rollouts, self.judgments, self.scores.values.tolist(), strict=True):
            generation = rollout.generation
            reply = {"id": rollout.id, "prompt": rollout.prompt.id, "source": rollout.prompt.source, "text": rollout.text}
            told = {"finish_reason": generation.finish_reason, "tokens": len(generation.tokens), "score": score}
            yield reply | told | {"judgment": None if judgment is None else judgment.reward}

    def _of_samples(self) -> dict[str, float]:
        valid = int(self.scores.valid.sum())
        count = len(self.rollouts)
        values = {
            "score": float(self.scores.values.sum()) / max(1, valid),
            "samples": float(count),
            "trained_samples": float(valid),
        }
        for kind in self._kinds:
            present, failed, total, _ = self.scores.sums[kind].tolist()
            values[f"reward/{kind}"] = total / present if present else float("nan")
            values[f"reward/{kind}_failed"] = failed
        lengths = [len(rollout.generation.tokens) for rollout in self.rollouts]
        values["response_tokens"] = sum(lengths) / count
        values["cut"] = sum(rollout.generation.finish_reason == "length" for rollout in self.rollouts) / count
        judged = [judgment for judgment in self.judgments if judgment is not None]
        if judged:
            summary = summarise(judged)
            for name in ("masked", "cut"):
                values[f"judge/{name}"] = summary[name] / len(judged)
            if summary["both_orders"]:
                values["judge/orders_disagree"] = summary["orders_disagree"] / summary["both_orders"]
        return values

    def _of_tokens(self, experience: Experience, ppo: PPO) -> dict[str, float]:
        mask, count = experience.mask, max(1, int(experience.mask.sum()))
        sums, largest = mismatch(experience.old, experience.rollout, mask)
        values = {"kl": self.kl, "kl_per_token": float(masked_sum(experience.old - experience.reference, mask)) / count}
        values |= {"entropy": float(masked_sum(self.entropy, mask)) / count, "beta": ppo.kl.beta}
        values["rollout/dlogp_mean"], values["rollout/dlogp_max"] = float(sums.pop("dlogp")) / count, float(largest)
        return values | {f"rollout/{name}": float(value) / count for name, value in sums.items()}

    def _of_learning(self, ppo: PPO) -> dict[str, float]:
        values: dict[str, float] = {"skipped_updates": float(ppo.actor.skipped)}
        for name, learner in (("actor", ppo.actor), ("critic", ppo.critic)):
            if learner is None:
                continue
            sums, norm, rate = learner.flush()
            count = sums.get("tokens", 0.0)
            means = [each for each in (*_OF_POLICY, *_OF_VALUES) if each in sums]
            values |= {each: sums[each] / count if count else float("nan") for each in means}
            if "returns" in sums:
                values["explained_variance"] = explained_variance(sums, count)
            values |= {f"{name}/grad_norm": norm, f"{name}/learning_rate": rate}
        return values
