"""KL estimators: their values and their gradients in expectation, in closed form over a small distribution; the coefficient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.config.load import ConfigError, load_config
from step_megatron.config.rl import KLConfig
from step_megatron.rl.kl import KLController, estimator_of, kl_estimate


@pytest.fixture
def distributions():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.2, -0.5, 0.1], dtype=torch.float64).log_softmax(0)
    return logits, logits.log_softmax(0), reference


def expected_gradient(logits, log_p, reference, estimator):
    """E over tokens drawn from pi of the gradient of the estimate, by enumeration."""
    probabilities = log_p.detach().exp()
    return torch.autograd.grad((probabilities * kl_estimate(log_p, reference, estimator)).sum(), logits, retain_graph=True)[0]


def test_k1_and_k3_are_unbiased_estimates_and_k2_is_not(distributions):
    _, log_p, reference = (x.detach() for x in distributions)
    exact = (log_p.exp() * (log_p - reference)).sum()
    expected = {name: (log_p.exp() * kl_estimate(log_p, reference, name)).sum() for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], exact)
    torch.testing.assert_close(expected["k3"], exact)
    assert abs(expected["k2"] - exact) > 0.05


def test_gradients_in_the_loss(distributions):
    """k1: of nothing. k2: of KL(pi || ref). k3: of KL(ref || pi), another divergence."""
    logits, log_p, reference = distributions
    reverse = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((reference.exp() * (reference - log_p)).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(expected_gradient(*distributions, "k1"), torch.zeros_like(logits), rtol=0, atol=1e-15)
    torch.testing.assert_close(expected_gradient(*distributions, "k2"), reverse)
    torch.testing.assert_close(expected_gradient(*distributions, "k3"), forward)
    assert (reverse - forward).abs().max() > 0.1


@given(st.floats(-5, 5), st.sampled_from(["k1", "k2", "k3"]))
def test_estimates_equal_the_published_formulas(difference, estimator):
    """As TRL and verl write them, of ref - new."""
    log_p, reference = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.7 - difference], dtype=torch.float64)
    negative = reference - log_p
    published = {"k1": -negative, "k2": 0.5 * negative**2, "k3": negative.exp() - negative - 1}[estimator]
    torch.testing.assert_close(kl_estimate(log_p, reference, estimator), published, rtol=1e-9, atol=1e-12)


def test_k3_stays_finite_where_the_reference_is_far():
    log_p = torch.tensor([-200.0, 0.0], requires_grad=True)
    estimate = kl_estimate(log_p, torch.tensor([0.0, -200.0]), "k3")
    assert estimate.isfinite().all() and estimate[1].item() == pytest.approx(199)
    estimate.sum().backward()
    assert log_p.grad.isfinite().all() and log_p.grad[1] == 1


def test_defaults_by_place_and_the_refusal_of_k1_in_the_loss():
    assert estimator_of(KLConfig()) == "k1"
    assert estimator_of(KLConfig(place="loss")) == "k2"
    assert estimator_of(KLConfig(place="loss", estimator="k3")) == "k3"
    with pytest.raises(ConfigError, match="expected gradient of k1 is zero.*use k2"):
        estimator_of(load_config(None, ["rl.ppo.kl.place=loss", "rl.ppo.kl.estimator=k1"]).rl.ppo.kl)
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_the_controller_follows_ziegler():
    controller = KLController(KLConfig(beta=0.2, target=6.0, horizon=1000))
    controller.update(12.0, 64)
    assert controller.beta == pytest.approx(0.2 * (1 + 0.2 * 64 / 1000))
    controller.update(5.7, 100)
    assert controller.beta == pytest.approx(0.2 * (1 + 0.2 * 64 / 1000) * (1 - 0.05 * 100 / 1000))


@given(st.lists(st.floats(0, 100), max_size=8))
def test_the_controller_resumes_and_stays_positive(measured):
    kl = KLConfig(beta=0.1, target=3.0, horizon=100)
    whole, first = KLController(kl), KLController(kl)
    for value in measured[: len(measured) // 2]:
        first.update(value, 64)
    second = KLController(kl)
    second.load_state_dict(first.state_dict())
    for value in measured[len(measured) // 2 :]:
        second.update(value, 64)
    for value in measured:
        whole.update(value, 64)
    assert whole.beta == second.beta > 0


def test_without_a_target_beta_is_fixed_and_a_target_must_be_positive():
    controller = KLController(KLConfig(beta=0.1))
    controller.update(50.0, 1000)
    assert controller.beta == 0.1
    with pytest.raises(ConfigError, match="target=0.0"):
        KLController(KLConfig(target=0.0))
