"""Distance of the policy from its reference: estimators, where the penalty goes, and the coefficient that adapts.

With d = log pi(y) - log pi_ref(y) of a token that pi sampled, estimates of KL(pi || pi_ref) are

    k1 = d                 unbiased, of high variance, may be negative
    k2 = d^2 / 2           biased, of low variance
    k3 = e^-d - 1 + d      unbiased, never negative

As a part of the **reward** (`place=reward`) the estimate is a number: k1 is right, and the policy gradient differentiates it.
As a part of the **loss** (`place=loss`) its own gradient counts, which is another question. With y ~ pi:

    E[grad k1] = E[grad log pi] = 0: no penalty at all, so it is refused;
    E[grad k2] = E[d grad log pi] = grad KL(pi || pi_ref): right, the default;
    E[grad k3] = E[(1 - pi_ref / pi) grad log pi] = grad KL(pi_ref || pi): the gradient of the *other* divergence. It is biased
    for the penalty that is meant, weak where the policy does what the reference never would, and there for comparison only.

Source: Schulman 2020, "Approximating KL divergence"; Ziegler et al. 2019 (adaptive coefficient).
"""

import torch

from step_megatron.config.load import ConfigError
from step_megatron.config.rl import KLConfig

# e^20 is far beyond any ratio that means something, and its square is still finite in float32.
LARGEST_LOG_RATIO = 20.0
DEFAULT_ESTIMATOR = {"reward": "k1", "loss": "k2"}


def kl_estimate(log_probs: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate of KL(pi || pi_ref) at every token, `[tokens]`; differentiable with respect to `log_probs`.

    Args:
        log_probs, reference: log-probability of each token under the policy and under its reference, `[tokens]`.
        estimator: `k1`, `k2` or `k3`.
    """
    difference = log_probs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(min=-LARGEST_LOG_RATIO)
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}; use k1, k2 or k3")


def estimator_of(kl: KLConfig) -> str:
    """The estimator that a configuration means.

    Raises:
        ConfigError: k1 in the loss.
    """
    estimator = DEFAULT_ESTIMATOR[kl.place] if kl.estimator == "auto" else kl.estimator
    if kl.place == "loss" and estimator == "k1":
        raise ConfigError(
            "rl.ppo.kl.estimator=k1 with rl.ppo.kl.place=loss: the expected gradient of k1 is zero, so nothing would hold the "
            "policy near its reference; use k2 there, or place=reward"
        )
    return estimator


class KLController:
    """The coefficient beta of the penalty: fixed, or adapted so that the measured KL comes to a target.

        error = clip(kl / target - 1, -0.2, 0.2)        beta <- beta (1 + error samples / horizon)

    Args:
        kl: `beta` to start from; `target` (None keeps beta fixed) in the unit of what `update` is told; `horizon` in samples.
    """

    def __init__(self, kl: KLConfig):
        if kl.target is not None and (kl.target <= 0 or kl.horizon <= 0):
            raise ConfigError(
                f"rl.ppo.kl: target={kl.target} and horizon={kl.horizon} must be positive; leave target out for none"
            )
        self.beta, self.target, self.horizon = kl.beta, kl.target, kl.horizon

    def update(self, kl: float, samples: int) -> None:
        """Adapt to the KL of a batch of so many samples (of all ranks, so that all have the same beta)."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= max(0.0, 1 + error * samples / self.horizon)

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = float(state["beta"])
