"""What is asked of the engine and what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

# Stop ids of a sample: buffers of a decoding step have a fixed width.
MOST_STOPS = 16

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Prompt:
    """One prompt; it has to end in text.

    Attributes:
        tokens: ids, with a placeholder for every audio token.
        audio_positions: index into `tokens` of every placeholder, in order.
        audio_features: `[sum(encoder_frames), encoder_width]`, chunks back to back; None without audio.
        encoder_frames: 25 Hz frames of every chunk.
    """

    tokens: Sequence[int]
    audio_positions: Sequence[int] = ()
    audio_features: torch.Tensor | None = None
    encoder_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReasoningBudget:
    """End the reasoning of samples that do not end it themselves.

    Attributes:
        tokens: a sample that has generated so many without ending its reasoning gets `closing`.
        closing: ids put there, such as those of a newline and `</think>`.
        endings: id sequences; a sample that has generated one of them has ended its reasoning.
    """

    tokens: int
    closing: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when a sample ends.

    The policy is the model's distribution at this temperature, before anything is cut off or penalised: its log-probabilities
    are what `Generation.logprobs` holds.

    Attributes:
        temperature: 0 is greedy, with log-probabilities at temperature 1.
        top_p: draw among the most likely tokens whose probabilities reach this share; 1 is all.
        top_k: draw among so many of the most likely tokens; 0 is all.
        repetition_penalty: logits of tokens that the prompt or the sample holds are divided by this where positive, multiplied
            where negative (Keskar et al., CTRL, arXiv:1909.05858); 1 is none.
        seed: names the sample's random numbers; number `i` of a sample depends on its seed and on `i` alone.
        max_new_tokens: most tokens generated.
        min_new_tokens: the sample cannot stop before it has so many.
        stop_ids: ids that end a sample.
        budget: bounds the reasoning.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    budget: ReasoningBudget | None = None

    def __post_init__(self):
        wrong = {
            "temperature": (self.temperature >= 0, "must be 0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "must be above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "must be 0 (all) or more"),
            "repetition_penalty": (self.repetition_penalty > 0, "must be above 0; 1 is none"),
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "stop_ids": (len(self.stop_ids) <= MOST_STOPS, f"must be at most {MOST_STOPS}"),
        }
        for name, (right, remedy) in wrong.items():
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: {remedy}")


@dataclass
class Generation:
    """One sample.

    Attributes:
        tokens: generated ids, the stop token included.
        logprobs: log-probability of each token under the policy (see `Sampling`).
        finish_reason: `stop` (a stop token), `length` (as many as allowed), or `cancelled`.
        forced: how many of the tokens the reasoning budget put there, from `forced_from` on.
        weight_version: the version of the weights that generated it (`Engine.weight_version`).
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    forced: int = 0
    forced_from: int = 0
    weight_version: int = 0
