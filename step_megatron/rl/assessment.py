"""From scores and log-probabilities to advantages: what every token of an experience is trained towards."""

import torch

from step_megatron.config.rl import PPOConfig
from step_megatron.rl.advantages import critic_advantages, group_relative, leave_one_out, token_rewards
from step_megatron.rl.kl import estimator_of, kl_estimate
from step_megatron.rl.packed import masked, spread, whiten
from step_megatron.rl.rollout import Experience


def assess(experience: Experience, scores: torch.Tensor, ppo: PPOConfig, beta: float) -> float:
    """Set `advantages` and `returns`; returns the mean KL of a sample, summed over its tokens (k1, unbiased).

    Args:
        experience: with `old`, `reference`, `valid`, and `values` where the baseline is the critic.
        scores: `[samples]`, the reward of each response.
        beta: coefficient of the KL penalty.

    A response that was cut at its longest is judged as it is: nothing is expected to follow, so there is no bootstrap.
    """
    mask, cu_seqlens, tokens = experience.mask, experience.cu_seqlens, experience.tokens
    kl = masked(kl_estimate(experience.old, experience.reference, "k1"), mask)
    in_reward = ppo.kl.place == "reward"
    penalty = masked(kl_estimate(experience.old, experience.reference, estimator_of(ppo.kl)), mask) if in_reward else None
    scores = masked(scores.float(), experience.valid)
    if ppo.baseline == "critic":
        rewards = token_rewards(scores, cu_seqlens, penalty, beta, tokens)
        advantages, returns = critic_advantages(rewards, experience.values, cu_seqlens, ppo.gamma, ppo.gae_lambda)
    else:
        if penalty is not None:
            scores = scores - beta * _per_sample(penalty, cu_seqlens)
        groups = int(experience.group.max()) + 1
        baseline = group_relative if ppo.baseline == "group" else leave_one_out
        advantages = spread(baseline(scores, experience.group, experience.valid, groups), cu_seqlens, tokens)
        returns = torch.zeros_like(advantages)
    experience.advantages = whiten(advantages, mask) if ppo.whiten_advantages else masked(advantages, mask)
    experience.returns = masked(returns, mask)
    samples = int(experience.valid.sum())
    return float(kl.sum()) / samples if samples else 0.0


def _per_sample(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum of each sample's tokens, `[samples]`."""
    number = spread(torch.arange(len(cu_seqlens) - 1), cu_seqlens, len(values))
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, number, values)
