"""The probe equals scikit-learn's logistic regression, and its features what they are said to be."""

import numpy as np
import pytest
import torch

from step_megatron.evaluation.probe import LogisticRegression, clip_features, probe_predictions


def problem(n: int, features: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes), torch.randint(0, classes, (n - classes,), generator=generator)])
    centres = torch.randn(classes, features, generator=generator)
    return centres[y] + 1.5 * torch.randn(n, features, generator=generator), y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("inverse_penalty", [0.1, 1.0])
def test_equals_scikit_learn(classes, inverse_penalty):
    # Binary problems are fitted as two-class softmax here and as one sigmoid there, which halves the penalty's effect.
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = problem(120, 30, classes)
    ours = LogisticRegression(inverse_penalty, tolerance=1e-7).fit(x, y, classes)
    theirs = linear_model.LogisticRegression(
        C=inverse_penalty if classes > 2 else 2 * inverse_penalty, max_iter=5000, tol=1e-10
    ).fit(x.double().numpy(), y.numpy())
    held_out, _ = problem(200, 30, classes, seed=1)
    expected = theirs.predict_proba(held_out.double().numpy())
    np.testing.assert_allclose(ours.probabilities(held_out).numpy(), expected, atol=2e-5)


def test_gradient_is_zero_at_the_fit():
    x, y = problem(90, 8, 3)
    model = LogisticRegression(0.7).fit(x, y, 3)
    error = model.probabilities(x) - torch.nn.functional.one_hot(y, 3)
    assert (error.T @ x.double() + model.weight / 0.7).abs().max() < 1e-4
    assert error.sum(0).abs().max() < 1e-4


def test_features_of_a_clip():
    encoded = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0], [7.0, 6.0]], dtype=torch.bfloat16)
    features = clip_features(encoded)
    np.testing.assert_allclose(features.numpy(), [4, 3, np.sqrt(5), 3, -4, -6], rtol=1e-6)
    assert features.dtype == torch.float32


def test_features_of_one_frame_are_finite_and_of_none_an_error():
    np.testing.assert_allclose(clip_features(torch.tensor([[2.0, -1.0]])).numpy(), [2, -1, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="frames >= 1"):
        clip_features(torch.zeros(0, 2))


def test_predictions_standardise_and_survive_a_constant_feature():
    x, y = problem(200, 6, 3)
    labels = ["it", "fr", "ru"]
    # Scales that no unstandardised fit would survive, and a feature that never changes in training.
    scaled = torch.cat([x * torch.tensor([1e-6, 1e3, 1, 1, 1, 1e5]), torch.full((200, 1), 7.0)], dim=1)
    names = [labels[i] for i in y.tolist()]
    test = scaled[150:].clone()
    test[:, -1] = -1e9
    guesses = probe_predictions(list(scaled[:150]), names[:150], list(test))
    assert np.mean([guess == name for guess, name in zip(guesses, names[150:], strict=True)]) > 0.6


def test_one_class_is_refused_and_no_test_clip_is_fine():
    with pytest.raises(ValueError, match="two classes"):
        probe_predictions([torch.zeros(3)], ["a"], [torch.zeros(3)])
    assert probe_predictions([torch.zeros(3), torch.ones(3)], ["a", "b"], []) == []
