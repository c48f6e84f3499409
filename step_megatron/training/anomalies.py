"""What counts as an anomaly in training, and what becomes of its step (`training.anomaly`).

A step is out of order when its loss or its gradient norm is not finite, or is more than a factor above the running median of the
steps before it. Its batch is written down (`training.replay`), and then

    skip     the update is left out: parameters and moments keep their bits, the data moves on
    rewind   the run goes back to its last checkpoint; all batches since then, the one out of order included, are left out
    stop     the run ends, with nothing saved: its last checkpoint stands

Scaled gradients that overflow are no anomaly while the loss scale can still become smaller: that is Megatron's own way with
float16. Everything is decided from values that are the same on every rank and are part of a checkpoint: a run that was killed
decides again as it did.
"""

import math
import statistics
from collections import deque
from typing import Any

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import AnomalyConfig
from step_megatron.errors import UserError
from step_megatron.training.exchange import StepFacts


class TrainingAnomaly(UserError, RuntimeError):
    """A step out of order ends the run; the message names the step, what is wrong with it, and what can be done."""


class AnomalyGuard:
    """Tells which steps are out of order.

    Attributes:
        count: anomalies since the run began.
        in_a_row: anomalies since a step was in order that is later than the last of them. (A step before that says nothing: a run
            that went back has been there already.)

    Raises:
        ConfigError: a factor that every second step would exceed, or a window or a limit below 1.
    """

    def __init__(self, settings: AnomalyConfig):
        for name in ("loss_factor", "grad_norm_factor"):
            if (factor := getattr(settings, name)) and not factor > 1:
                raise ConfigError(f"training.anomaly.{name}={factor}: must be above 1, or 0 for no limit")
        for name in ("window", "max_in_a_row"):
            if getattr(settings, name) < 1:
                raise ConfigError(f"training.anomaly.{name}={getattr(settings, name)}: must be at least 1")
        self.settings = settings
        self.count = self.in_a_row = 0
        self._last = 0
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._norms: deque[float] = deque(maxlen=settings.window)

    @property
    def exhausted(self) -> bool:
        """Whether there were so many in a row that the run has to stop."""
        return self.in_a_row >= self.settings.max_in_a_row

    def examine(self, step: int, facts: StepFacts, overflow_is_final: bool = False) -> str | None:
        """What is wrong with a step, or None; remembers it either way.

        Args:
            overflow_is_final: scaled gradients overflowed, and a smaller loss scale is not to be had.
        """
        reason = self._reason(facts, overflow_is_final)
        if reason is not None:
            self.count += 1
            self.in_a_row += 1
            self._last = step
        elif facts.gradient_norm is not None:
            self._losses.append(facts.loss)
            self._norms.append(facts.gradient_norm)
            if step > self._last:
                self.in_a_row = 0
        return reason

    def _reason(self, facts: StepFacts, overflow_is_final: bool) -> str | None:
        # A step in which every clip failed has no loss, and no gradient either.
        if facts.sums[:, 1].sum() and not math.isfinite(facts.loss):
            return f"the loss is {facts.loss}"
        if facts.gradient_norm is None:
            return "gradients overflow at the smallest loss scale" if overflow_is_final else None
        if not math.isfinite(facts.gradient_norm):
            return f"the gradient norm is {facts.gradient_norm}"
        return _above("loss", facts.loss, self.settings.loss_factor, self._losses) or _above(
            "gradient norm", facts.gradient_norm, self.settings.grad_norm_factor, self._norms
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain values, the same on every rank."""
        history = {"losses": list(self._losses), "norms": list(self._norms)}
        return history | {"count": self.count, "in_a_row": self.in_a_row, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; the window is this run's."""
        self.load_history(state)
        self.count, self.in_a_row, self._last = state["count"], state["in_a_row"], state["last"]

    def load_history(self, state: dict[str, Any]) -> None:
        """Take the medians from a saved state and keep the counts: the run goes back, its anomalies have happened."""
        self._losses = deque(state["losses"], self.settings.window)
        self._norms = deque(state["norms"], self.settings.window)


def _above(name: str, value: float, factor: float, before: deque[float]) -> str | None:
    """Why `value` is too large beside those before it; nothing is too large until half of the window is known."""
    if not factor or 2 * len(before) < before.maxlen:
        return None
    median = statistics.median(before)
    if value <= factor * median:
        return None
    return f"the {name} is {value:.6g}, more than {factor:g} times the median {median:.6g} of {len(before)} steps before"
