"""Linear probe on the frozen encoder's features: what a listener without a language model gets right.

- `clip_features`: one vector of a clip, `[3 * width]`: mean, standard deviation, first half minus second half;
- `LogisticRegression`: multinomial, L2, fitted with L-BFGS in float64 (the objective of scikit-learn's, which the test compares
  with);
- `probe_predictions`: standardise, fit on the train clips, label the test clips.
"""

from collections.abc import Sequence

import torch


def clip_features(encoded: torch.Tensor) -> torch.Tensor:
    """Describe a clip by `[3 * width]` float32 numbers: mean, standard deviation (biased) and mean of the first half minus the
    second.

    Args:
        encoded: `[frames, width]` encoder output, 25 Hz, any float type, chunks joined. The first half has `frames // 2`
            frames, at least one.

    Raises:
        ValueError: if there is no frame.
    """
    if encoded.ndim != 2 or encoded.shape[0] == 0:
        raise ValueError(f"a clip needs encoder output [frames >= 1, width], got {tuple(encoded.shape)}")
    x = encoded.float()
    half = max(1, x.shape[0] // 2)
    # A clip of one frame has no halves: its difference is zero.
    difference = x[:half].mean(0) - (x[half:].mean(0) if x.shape[0] > 1 else x[:half].mean(0))
    return torch.cat([x.mean(0), x.std(0, correction=0), difference])


class LogisticRegression:
    """Multinomial logistic regression, `sum(cross entropy) + |weight|^2 / (2 * inverse_penalty)`, the bias not penalised.

    Args:
        inverse_penalty: scikit-learn's `C`.
        max_iterations: of L-BFGS; the fit stops before that at a gradient of `tolerance`.
    """

    def __init__(self, inverse_penalty: float = 1.0, max_iterations: int = 300, tolerance: float = 1e-4):
        self.inverse_penalty, self.max_iterations, self.tolerance = inverse_penalty, max_iterations, tolerance
        self.weight = self.bias = None

    def fit(self, x: torch.Tensor, y: torch.Tensor, classes: int) -> "LogisticRegression":
        """Fit to `x` `[n, features]` and `y` `[n]` int64 in `[0, classes)`."""
        x = x.double()
        weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=self.max_iterations,
            tolerance_grad=self.tolerance,
            # Close to the optimum a line search only moves within rounding: stop there.
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def objective() -> torch.Tensor:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y, reduction="sum")
            loss = loss + weight.square().sum() / (2 * self.inverse_penalty)
            loss.backward()
            return loss

        # Hundreds of small products: where cores are shared, a second thread waits longer than it works.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.enable_grad():
                optimizer.step(objective)
        finally:
            torch.set_num_threads(threads)
        self.weight, self.bias = weight.detach(), bias.detach()
        return self

    def probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, classes]` float64."""
        return torch.softmax(x.double() @ self.weight.T + self.bias, dim=1)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Most probable class, `[n]` int64."""
        return self.probabilities(x).argmax(1)


def probe_predictions(
    train: Sequence[torch.Tensor], train_labels: Sequence[str], test: Sequence[torch.Tensor], inverse_penalty: float = 1.0
) -> list[str]:
    """Fit on the train clips' `clip_features` and label the test clips.

    Features are standardised with the train clips' mean and standard deviation; a constant feature stays zero.

    Raises:
        ValueError: if the train labels hold fewer than two classes.
    """
    labels = sorted(set(train_labels))
    if len(labels) < 2:
        raise ValueError(f"a probe needs at least two classes to train on, got {labels}")
    if not len(test):
        return []
    x, unseen = torch.stack(list(train)).double(), torch.stack(list(test)).double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > 1e-12, 1 / deviation.clamp_min(1e-12), torch.zeros_like(deviation))
    y = torch.tensor([labels.index(label) for label in train_labels])
    model = LogisticRegression(inverse_penalty).fit((x - mean) * scale, y, len(labels))
    return [labels[i] for i in model.predict((unseen - mean) * scale).tolist()]
