"""Which sample comes next: sources mixed by trained tokens, epochs reshuffled, all a function of the seed and the position.

Equation 1 of the report is one objective over audio-grounded and text-only data. With losses summed over tokens, a source's share
of the objective is its share of *trained tokens*, so that is what a weight means: the next sample comes from the source that has
given the fewest trained tokens for its weight. No source is ever ahead of its share by more than one sample.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Source:
    """One source: its name in metrics, its weight, and how many samples it holds."""

    name: str
    weight: float
    size: int


class Mixture:
    """An endless stream of (source, sample) indices.

    Use: `source = choose()`, `sample = advance(source)`, and `credit(source, trained_tokens)` once the sample's count is known.

    Raises:
        ValueError: no source, a doubled name, a weight that is not positive, or a source without samples.
    """

    def __init__(self, sources: Sequence[Source], seed: int):
        if not sources:
            raise ValueError("data.sources is empty; name at least one source with a path and a weight")
        names = [source.name for source in sources]
        for source in sources:
            if not source.name or names.count(source.name) > 1:
                raise ValueError(f"data.sources: the name {source.name!r} is empty or used twice; give every source its own")
            if not 0 < source.weight < float("inf"):
                raise ValueError(
                    f"data.sources: {source.name!r} has weight {source.weight}; write a positive one, or remove the source"
                )
            if source.size < 1:
                raise ValueError(
                    f"data.sources: {source.name!r} has no usable sample; look at quarantine.jsonl, or remove the source"
                )
        self.sources, self.seed = tuple(sources), seed
        self._epochs = [0] * len(sources)
        self._positions = [0] * len(sources)
        self.tokens = [0] * len(sources)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def choose(self) -> int:
        """Index of the source that is furthest behind its share; the first of several."""
        return min(range(len(self.sources)), key=lambda i: self.tokens[i] / self.sources[i].weight)

    def advance(self, source: int) -> int:
        """Index of the next sample of `source`, and move on; every epoch gives every sample once, in its own order."""
        sample = int(self._order(source)[self._positions[source]])
        self._positions[source] += 1
        if self._positions[source] == self.sources[source].size:
            self._epochs[source] += 1
            self._positions[source] = 0
        return sample

    def credit(self, source: int, trained_tokens: int) -> None:
        """Count the trained tokens that a sample of `source` brought."""
        self.tokens[source] += trained_tokens

    def epochs(self) -> dict[str, float]:
        """Passes over each source so far, by name."""
        return {s.name: e + p / s.size for s, e, p in zip(self.sources, self._epochs, self._positions, strict=True)}

    def _order(self, source: int) -> np.ndarray:
        """The order of the current epoch of `source`, kept until the epoch ends."""
        epoch = self._epochs[source]
        if self._orders.get(source, (None,))[0] != epoch:
            name = int.from_bytes(hashlib.sha256(self.sources[source].name.encode()).digest()[:8], "little")
            self._orders[source] = (epoch, shuffled(self.sources[source].size, self.seed, name, epoch))
        return self._orders[source][1]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"epochs": list(self._epochs), "positions": list(self._positions), "tokens": list(self.tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position of a mixture of the same sources."""
        self._epochs, self._positions, self.tokens = (list(state[key]) for key in ("epochs", "positions", "tokens"))


def shuffled(count: int, *entropy: int) -> np.ndarray:
    """A permutation of `range(count)`, int64, that depends on `entropy` (non-negative integers) alone.

    It sorts the raw output of PCG64, which numpy keeps stable from release to release, unlike `Generator.permutation`.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count), kind="stable")
