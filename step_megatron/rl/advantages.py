"""What a response was worth, token by token: reward on the last token, KL penalty on every one, advantage over a baseline.

Three baselines: the critic (`critic_advantages`, generalised advantage estimation), the other samples of the same prompt with the
sample itself (`group_relative`), or without it (`leave_one_out`). All are targets, without gradient.

A sample that is not `valid` (its judgment failed) is in no group's statistics; its own advantage is zero.
"""

import torch
from step_kernels.gae import gae_varlen

from step_megatron.rl.packed import masked, on_last_token


def token_rewards(
    scores: torch.Tensor, cu_seqlens: torch.Tensor, kl: torch.Tensor | None = None, beta: float = 0.0, tokens: int | None = None
) -> torch.Tensor:
    """Reward of every token: minus beta times its KL estimate, and on the last token of a response its score.

    Args:
        scores: `[samples]`.
        kl: `[tokens]`, `kl.kl_estimate`, or None where the penalty is not in the reward; then `tokens` says how many there are.
    """
    tokens = tokens if kl is None else len(kl)
    rewards = on_last_token(scores, cu_seqlens, tokens)
    return rewards if kl is None else rewards - beta * kl.detach()


def critic_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, `[tokens]` each, of packed responses; see `step_kernels.gae`.

    Args:
        bootstrap: `[samples]`, the critic's value of what would come next: of responses that were cut, zero for those that ended.
    """
    return gae_varlen(rewards.detach(), values.detach(), cu_seqlens, gamma, gae_lambda, bootstrap)


def group_relative(
    scores: torch.Tensor, group: torch.Tensor, valid: torch.Tensor, groups: int, divide: bool = True, epsilon: float = 1e-6
) -> torch.Tensor:
    """(score - mean) / (standard deviation + epsilon) within the samples of a prompt, `[samples]`.

    Args:
        scores: `[samples]`.
        group: `[samples]` int64, the number of each sample's prompt, below `groups`.
        valid: `[samples]` bool.
        divide: False leaves the division out: dividing favours prompts whose samples are nearly alike.

    A group of one valid sample has no baseline: its advantage is zero.

    Source: Shao et al. 2024 (GRPO); Liu et al. 2025 (without the division).
    """
    count, mean = _group_means(scores, group, valid, groups)
    centred = masked(scores - mean[group], valid & (count[group] > 1))
    if not divide:
        return centred
    squares = torch.zeros_like(mean).index_add(0, group, centred.square())
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation[group] + epsilon)


def leave_one_out(scores: torch.Tensor, group: torch.Tensor, valid: torch.Tensor, groups: int) -> torch.Tensor:
    """Score minus the mean score of the prompt's other samples, `[samples]`; arguments as `group_relative`.

    With n samples this is n / (n - 1) (score - mean). A group of one valid sample has no baseline: its advantage is zero.

    Source: Kool et al. 2019; Ahmadian et al. 2024 (RLOO).
    """
    count, mean = _group_means(scores, group, valid, groups)
    own = count[group]
    return masked((scores - mean[group]) * own / (own - 1).clamp(min=1), valid & (own > 1))


def _group_means(
    scores: torch.Tensor, group: torch.Tensor, valid: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of valid samples of every group, and their mean score; `[groups]` each."""
    zeros = scores.new_zeros(groups)
    count = zeros.index_add(0, group, valid.to(scores.dtype))
    return count, zeros.index_add(0, group, masked(scores, valid)) / count.clamp(min=1)
