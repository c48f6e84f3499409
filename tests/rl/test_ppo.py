"""Losses and metrics equal loops over tokens in float64, by the formulas of the paper and of TRL and verl; gradients too."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.config.rl import KLConfig, PPOConfig
from step_megatron.rl.ppo import explained_variance, importance_weights, mismatch, policy_loss, value_loss
from tests.rl.packed_cases import batches, packed

SETTINGS = (
    PPOConfig(),
    PPOConfig(clip=0.1, clip_high=0.3, entropy_coefficient=0.02),
    PPOConfig(kl=KLConfig(place="loss")),
    PPOConfig(entropy_coefficient=0.01, kl=KLConfig(place="loss", estimator="k3")),
)


def clipped(low: float, value: float, high: float) -> float:
    return min(max(value, low), high)


def loop_policy_loss(ppo, beta, rows, mask):
    """One token after the other, Python floats."""
    total = clip_count = kl_sum = entropy_sum = 0.0
    for (new, old, advantage, entropy, reference, weight), counts in zip(rows, mask, strict=True):
        if not counts:
            continue
        ratio = math.exp(new - old)
        bounded = clipped(1 - ppo.clip, ratio, 1 + (ppo.clip_high or ppo.clip))
        total += -weight * min(ratio * advantage, bounded * advantage)
        clip_count += bounded * advantage < ratio * advantage
        difference = new - reference
        estimate = {"auto": difference**2 / 2, "k3": math.exp(-difference) - 1 + difference}[ppo.kl.estimator]
        kl_sum += estimate if ppo.kl.place == "loss" else difference
        total += beta * estimate if ppo.kl.place == "loss" else 0.0
        total -= ppo.entropy_coefficient * entropy
        entropy_sum += entropy
    return total, clip_count, kl_sum, entropy_sum


@given(batches, st.sampled_from(SETTINGS))
def test_policy_loss_equals_the_loop(batch, ppo):
    columns, mask, _ = packed(batch, columns=6)
    new, old, advantages, entropy, reference, weights = columns * 0.4
    loss = policy_loss(new, old, advantages, mask, ppo, 0.3, entropy, reference, weights.abs())
    rows = torch.stack([new, old, advantages, entropy, reference, weights.abs()]).T.tolist()
    total, clip_count, kl_sum, entropy_sum = loop_policy_loss(ppo, 0.3, rows, mask.tolist())
    assert loss.total.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert loss.count.item() == mask.sum().item()
    assert loss.sums["clip_fraction"].item() == clip_count
    assert loss.sums["kl"].item() == pytest.approx(kl_sum, rel=1e-9, abs=1e-12)
    assert loss.sums["entropy"].item() == pytest.approx(entropy_sum, rel=1e-9, abs=1e-12)


@given(batches)
def test_value_loss_equals_the_loop(batch):
    (values, old, returns), mask, _ = packed(batch, columns=3)
    loss = value_loss(values, old, returns, mask, 0.2)
    total = clip_count = 0.0
    for v, o, r, counts in zip(values.tolist(), old.tolist(), returns.tolist(), mask.tolist(), strict=True):
        plain, bounded = (v - r) ** 2, (clipped(o - 0.2, v, o + 0.2) - r) ** 2
        total += 0.5 * max(plain, bounded) * counts
        clip_count += (bounded > plain) * counts
    assert loss.total.item() == pytest.approx(total) and loss.sums["value_clip_fraction"].item() == clip_count
    kept = mask.nonzero().squeeze(1)
    if len(kept) > 1:
        expected = 1 - (returns - old)[kept].var(correction=0) / returns[kept].var(correction=0)
        sums = {name: value.item() for name, value in loss.sums.items()}
        assert explained_variance(sums, loss.count.item()) == pytest.approx(expected.item(), rel=1e-6)
    plain = value_loss(values, old, returns, mask, None).total
    torch.testing.assert_close(plain, 0.5 * (values - returns)[mask].square().sum())


def test_explained_variance_of_equal_returns_is_not_a_number():
    ones = torch.full((5,), 0.3, dtype=torch.float64)
    loss = value_loss(ones, 2 * ones, ones, torch.ones(5, dtype=torch.bool), None)
    assert math.isnan(explained_variance({name: value.item() for name, value in loss.sums.items()}, 5))
    assert math.isnan(explained_variance({}, 0))


@pytest.mark.parametrize("ppo", SETTINGS)
def test_gradients_are_those_of_finite_differences(ppo):
    columns, mask, _ = packed([(4, True), (3, False), (5, True)], seed=1, columns=6)
    new, old, advantages, entropy, reference, weights = columns * 0.4

    def loss(new, entropy):
        return policy_loss(new, old, advantages, mask, ppo, 0.3, entropy, reference, weights.abs()).total

    assert torch.autograd.gradcheck(loss, (new.clone().requires_grad_(), entropy.clone().requires_grad_()))
    assert torch.autograd.gradcheck(
        lambda values: value_loss(values, old, advantages, mask, 0.2).total, (new.clone().requires_grad_(),)
    )


@given(batches, st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_is_masked_out_changes_neither_loss_nor_gradient(batch, garbage):
    columns, mask, _ = packed(batch, columns=6)
    results = []
    for content in (0.0, garbage):
        spoilt = columns.clone()
        spoilt[:, ~mask] = content
        new, old, advantages, entropy, reference, weights = spoilt
        new, entropy = new.clone().requires_grad_(), entropy.clone().requires_grad_()
        ppo = SETTINGS[3]
        policy = policy_loss(new, old, advantages, mask, ppo, 0.3, entropy, reference, importance_weights(old, weights, mask, 2))
        value = value_loss(new, old, advantages, mask, 0.2)
        (policy.total + value.total).backward()
        sums, largest = mismatch(old, weights, mask)
        results.append([policy.total, value.total, new.grad, entropy.grad, *policy.sums.values(), *sums.values(), largest])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][2][~mask].any()


def test_sums_of_parts_are_the_sum_of_the_whole():
    """So a token weighs the same in whatever micro-batch it is: the caller divides by the global count."""
    (new, old, advantages), mask, _ = packed([(4, True), (3, False), (6, True), (1, True)], columns=3)
    whole = policy_loss(new, old, advantages, mask, PPOConfig())
    parts = [policy_loss(*(x[part] for x in (new, old, advantages, mask)), PPOConfig()) for part in (slice(5), slice(5, None))]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.count for part in parts) == whole.count == 11
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    (old, advantages), mask, _ = packed([(5, True)], columns=2)
    new = old.clone().requires_grad_()
    loss = policy_loss(new, old, advantages, mask, PPOConfig())
    loss.total.backward()
    torch.testing.assert_close(new.grad, -advantages)
    assert loss.sums["clip_fraction"] == loss.sums["approx_kl"] == 0


def test_a_huge_ratio_stays_finite():
    new = torch.tensor([500.0, -500.0], requires_grad=True)
    loss = policy_loss(new, torch.zeros(2), torch.tensor([-1.0, 0.0]), torch.ones(2, dtype=torch.bool), PPOConfig())
    loss.total.backward()
    assert loss.total.isfinite() and new.grad.isfinite().all()


@pytest.mark.parametrize("given_", [{"reference": None}, {"entropy": None}])
def test_what_the_settings_need_must_be_there(given_):
    (x, reference, entropy), mask, _ = packed([(3, True)], columns=3)
    ppo = PPOConfig(entropy_coefficient=0.1, kl=KLConfig(place="loss"))
    with pytest.raises(ValueError, match=f"needs `{next(iter(given_))}`"):
        policy_loss(x, x, x, mask, ppo, 0.1, **{"entropy": entropy, "reference": reference, **given_})


def test_truncated_weights_and_the_mismatch_behind_them():
    rollout = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    trainer = torch.tensor([-1.0, -0.5, 1.0, 9.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, True, False])
    weights = importance_weights(trainer, rollout, mask, 2.0)
    torch.testing.assert_close(weights[:3], torch.tensor([1.0, math.exp(0.5), 2.0], dtype=torch.float64))
    assert not weights.requires_grad
    sums, largest = mismatch(trainer, rollout, mask)
    assert sums["dlogp"].item() == pytest.approx(2.5) and largest.item() == 2
    assert [sums[f"dlogp_above_{t}"].item() for t in ("0.01", "0.1", "1")] == [2, 2, 1]
    assert sums["ratio"].item() == pytest.approx(1 + math.exp(0.5) + math.exp(2))


def test_a_truncated_sampler_shows_in_the_mean_ratio():
    """top-p renormalises: the rollout's probabilities are larger than the policy's, and the mean ratio falls below one."""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    truncated = torch.tensor([0.625, 0.375], dtype=torch.float64)
    sums, _ = mismatch(policy[:2].log(), truncated.log(), torch.ones(2, dtype=torch.bool))
    assert sums["ratio"].item() / 2 == pytest.approx(0.8)
