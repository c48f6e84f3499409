"""The ordinal scale of a judgment, and the reward that a level means: phi(g) = g / best."""

from dataclasses import dataclass

from step_megatron.config.load import ConfigError

# From the smallest step up; scales with more steps are described by their ends alone.
_DEGREES = ("slightly", "clearly", "much")


@dataclass(frozen=True)
class Scale:
    """Levels from `-best` (the second reply is far better) to `best` (the first one is); an even number of them has no tie.

    Raises:
        ConfigError: fewer than two levels.
    """

    levels: int = 7

    def __post_init__(self):
        if self.levels < 2:
            raise ConfigError(f"rl.judge.levels={self.levels}: a scale has at least 2 levels (7: -3 .. 3; 6: the same without 0)")

    @property
    def best(self) -> int:
        return self.levels // 2

    @property
    def values(self) -> tuple[int, ...]:
        """All levels, ascending."""
        return tuple(g for g in range(-self.best, self.best + 1) if g or self.levels % 2)

    def reward(self, level: float) -> float:
        """phi of a level, or of a mean of levels: -1 .. 1."""
        return level / self.best

    def describe(self) -> str:
        """What each level means, a line each, for the judge's instructions."""
        return "\n".join(f"{g}: {self._meaning(g)}" for g in reversed(self.values))

    def _meaning(self, level: int) -> str:
        if level == 0:
            return "both are equally good"
        better = f"reply {1 if level > 0 else 2} is"
        if self.best == len(_DEGREES):
            return f"{better} {_DEGREES[abs(level) - 1]} better"
        return f"{better} better by {abs(level)} of {self.best} steps"
