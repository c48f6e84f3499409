"""Proximal policy optimisation as pure functions on packed response tokens (see `packed.py`).

    L_policy = sum_t w_t max(-rho_t A_t, -clip(rho_t, 1 - eps, 1 + eps) A_t) + beta sum_t kl_t - c sum_t H_t
    L_value  = sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t - eps_v, V_old_t + eps_v) - R_t)^2) / 2
    rho_t = pi(y_t) / pi_old(y_t)        w_t = min(pi_old(y_t) / pi_rollout(y_t), C)

`log pi` and `log pi_old` are by the training forward, of the temperature-scaled, untruncated distribution; the rollout's own
numbers differ from them by its kernels, which the truncated importance weight w corrects.

Every loss is a **sum** beside the number of tokens summed over: whoever calls divides by the count of the global batch, so a
token weighs the same in whatever micro-batch or rank it is. Metrics are sums, too, added up over micro-batches and ranks before
anything is divided.

Source: Schulman et al. 2017; equation 4 of the Step-Audio-R1.5 report; truncated importance weights: Ionides 2008, Yao et al.
2025.
"""

from dataclasses import dataclass

import torch

from step_megatron.config.rl import PPOConfig
from step_megatron.rl.kl import LARGEST_LOG_RATIO, estimator_of, kl_estimate
from step_megatron.rl.packed import masked, masked_sum

# Shares of tokens whose log-probability differs by more than this between rollout and trainer are reported: the tail that a mean
# hides.
TAIL_THRESHOLDS = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Loss:
    """A summed loss.

    Attributes:
        total: scalar, with gradient.
        count: tokens summed over, a float64 scalar without gradient.
        sums: float64 scalars by name, without gradient; all are sums over the same tokens.
    """

    total: torch.Tensor
    count: torch.Tensor
    sums: dict[str, torch.Tensor]


def policy_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ppo: PPOConfig,
    beta: float = 0.0,
    entropy: torch.Tensor | None = None,
    reference: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> Loss:
    """The policy's whole loss: clipped ratio, KL penalty where `ppo.kl.place` is `loss`, entropy bonus.

    Args:
        log_probs: `[tokens]`, with gradient.
        old: `[tokens]`, log-probabilities before this iteration's first step, by the training forward.
        advantages: `[tokens]`, whitened or not.
        mask: `[tokens]` bool.
        beta: coefficient of the KL penalty, `kl.KLController.beta`.
        entropy: `[tokens]`, with gradient; needed where `ppo.entropy_coefficient` is not zero.
        reference: `[tokens]`, log-probabilities under the reference policy; needed for the penalty in the loss.
        weights: `[tokens]`, `importance_weights`, None for ones.

    Returns:
        `sums`: `policy_loss`, `clip_fraction`, `approx_kl` (k3 of old against new), `kl` and `entropy` where given.

    Raises:
        ValueError: entropy or reference is needed and not there.
    """
    log_ratio = masked(log_probs - old.detach(), mask).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = masked(advantages.detach(), mask)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - ppo.clip, 1 + (ppo.clip if ppo.clip_high is None else ppo.clip_high))
    losses = torch.maximum(plain, clipped)
    if weights is not None:
        losses = losses * masked(weights.detach(), mask)
    total = masked_sum(losses, mask)
    sums = {
        "policy_loss": total,
        "clip_fraction": masked_sum((clipped > plain).double(), mask),
        # The old policy drew the tokens, so e^d - 1 - d is k3 of KL(old || new).
        "approx_kl": masked_sum(torch.expm1(log_ratio) - log_ratio, mask),
    }
    if ppo.entropy_coefficient or entropy is not None:
        sums["entropy"] = masked_sum(_needed(entropy, "entropy", "rl.ppo.entropy_coefficient is not zero"), mask)
        total = total - ppo.entropy_coefficient * sums["entropy"]
    if ppo.kl.place == "loss" or reference is not None:
        reference = _needed(reference, "reference", "rl.ppo.kl.place is loss").detach()
        penalty = kl_estimate(masked(log_probs, mask), masked(reference, mask), estimator_of(ppo.kl)).sum()
        sums["kl"] = penalty
        if ppo.kl.place == "loss":
            total = total + beta * penalty
    return Loss(total, mask.sum().double(), _detached(sums))


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float | None
) -> Loss:
    """The critic's clipped squared error; `values` with gradient, all `[tokens]`. `clip` None leaves the clipping out.

    Returns:
        `sums`: `value_loss`, `value_clip_fraction`, and what `explained_variance` is made of.
    """
    values, old_values, returns = masked(values, mask), masked(old_values.detach(), mask), masked(returns.detach(), mask)
    plain = clipped = (values - returns).square()
    if clip is not None:
        clipped = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square()
    total = torch.maximum(plain, clipped).sum() / 2
    error, exact = (returns - old_values).double(), returns.double()
    sums = {
        "value_loss": total,
        "value_clip_fraction": (clipped > plain).sum(),
        "returns": exact.sum(),
        "returns_squared": exact.square().sum(),
        "errors": error.sum(),
        "errors_squared": error.square().sum(),
    }
    return Loss(total, mask.sum().double(), _detached(sums))


def explained_variance(sums: dict[str, float], count: float) -> float:
    """1 - Var(returns - old values) / Var(returns), of the sums that `value_loss` gives; NaN where all returns are equal.

    1: the critic knew every return; 0: no better than their mean; below: worse.
    """
    if count == 0:
        return float("nan")
    of_returns = sums["returns_squared"] / count - (sums["returns"] / count) ** 2
    of_errors = sums["errors_squared"] / count - (sums["errors"] / count) ** 2
    # Below this a variance in float64 is rounding.
    smallest = 1e-12 * max(1.0, sums["returns_squared"] / count)
    return 1 - max(of_errors, 0.0) / of_returns if of_returns > smallest else float("nan")


def importance_weights(trainer: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor, truncation: float) -> torch.Tensor:
    """min(pi_old / pi_rollout, truncation) at every token, `[tokens]`, without gradient.

    Args:
        trainer, rollout: log-probabilities of the same tokens by the training forward and by the rollout engine.
        truncation: the largest weight; the bias it brings buys bounded variance.
    """
    log_ratio = masked(trainer.detach() - rollout.detach(), mask).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return log_ratio.exp().clamp(max=truncation)


def mismatch(trainer: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """How far rollout and trainer disagree about the same tokens.

    Returns:
        Sums: `dlogp` of |log pi_old - log pi_rollout|, `dlogp_above_T` tokens above each of `TAIL_THRESHOLDS`, and `ratio`
        (pi_old / pi_rollout, whose mean is 1 where the rollout sampled from the untruncated policy); and the largest |dlogp|,
        a scalar, whose maximum is taken over ranks.
    """
    difference = masked(trainer.detach() - rollout.detach(), mask).double()
    distance = difference.abs()
    sums = {"dlogp": distance.sum(), "ratio": masked_sum(difference.clamp(max=LARGEST_LOG_RATIO).exp(), mask)}
    sums |= {f"dlogp_above_{threshold:g}": (distance > threshold).sum().double() for threshold in TAIL_THRESHOLDS}
    return sums, distance.max() if len(distance) else distance.sum()


def _needed(value: torch.Tensor | None, name: str, why: str) -> torch.Tensor:
    if value is None:
        raise ValueError(f"policy_loss needs `{name}`: {why}")
    return value


def _detached(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() for name, value in sums.items()}
