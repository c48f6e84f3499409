"""Choosing the next token from logits: greedy, temperature and nucleus, reproducible row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from step_megatron.runtime import seeds


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: draw among the most likely tokens whose probabilities reach this share; 1 is all.
        seed: row `i` draws from a generator of `(seed, i)`, so what else is in the batch does not change its numbers.

    Raises:
        ValueError: a negative temperature, or `top_p` outside (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")


class Sampler:
    """Draws tokens for a batch of rows.

    Args:
        sampling: temperature and nucleus.
        rows: the prompts' indices; they name the generators.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]):
        self.sampling = sampling
        self._generators = {} if sampling.temperature == 0 else {row: seeds.generator(sampling.seed, row) for row in rows}

    def __call__(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Next tokens `[n]` int64 from `logits` `[n, vocabulary]` of the rows with these indices."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        uniform = torch.stack([torch.rand((), generator=self._generators[row]) for row in rows]).to(logits.device)
        probabilities, order = (logits.float() / self.sampling.temperature).softmax(-1).sort(-1, descending=True)
        cumulative = probabilities.cumsum(-1)
        # The nucleus: tokens before which less than `top_p` has been reached; its last place bounds what rounding can do below.
        last = (cumulative - probabilities < self.sampling.top_p).sum(-1, keepdim=True) - 1
        # The inverse of the cumulative distribution: the first place whose cumulative probability is above the uniform number.
        target = uniform[:, None] * cumulative.gather(-1, last)
        place = torch.searchsorted(cumulative, target, right=True)
        return order.gather(-1, torch.minimum(place, last)).squeeze(-1)
