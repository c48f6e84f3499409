"""Rewards: several kinds in one batch, each weighted, normalised and logged apart.

    score = sum over the kinds that apply of weight x (value, or (value - mean) / deviation of that kind so far)

Kinds (`KINDS`): `preference` and `rubric`, a judgment's reward without and with criteria; `verifiable`, one of `checks.CHECKS`;
`reasoning_present`, whether there is reasoning before the reply; `length`, a penalty outside of a range. A recipe of
Step-Audio-R1 (equations 6-7) is

    rl.rewards: [{kind: verifiable, weight: 0.8}, {kind: reasoning_present, weight: 0.2}]

Rubric and preference samples have a scale each: with one normalisation for both, the kind whose rewards are spread wider would
rule the joint batch. A sample whose judgment failed has no score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from step_megatron.config.load import ConfigError
from step_megatron.config.rl import RewardConfig
from step_megatron.evaluation.scoring import split_reply
from step_megatron.rl.judge.judging import Judgment
from step_megatron.rl.packed import moments
from step_megatron.rl.verifiable import CHECKS

# Deviations of normalised values that count; a rare value after thousands of equal ones would be worth any number of them.
_CLIP = 5.0
_SMALLEST_DEVIATION = 1e-4


@dataclass(frozen=True)
class Sample:
    """One response, with what it can be rewarded for.

    Attributes:
        written: what the policy wrote, from inside its thinking on.
        tokens: how many it wrote.
        judgment: of its reply against a reference; None where there is no reference.
        answer: the one right answer; None where there is none.
        check: how the answer is compared, a key of `checks.CHECKS`.
        choices: of a multiple-choice question, in the order of their letters.
    """

    id: str
    written: str
    tokens: int
    judgment: Judgment | None = None
    answer: str | None = None
    check: str = "exact"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of reward: the samples that it applies to, and its value (None: the judgment failed)."""

    applies: Callable[[Sample], bool]
    value: Callable[[Sample, RewardConfig], float | None]


def final_reply(written: str) -> str:
    """The reply without its reasoning, as judges and checks see it; empty where the reasoning never ended."""
    return split_reply(written).answer or ""


def _verifiable(sample: Sample, reward: RewardConfig) -> float:
    try:
        return CHECKS[sample.check](final_reply(sample.written), sample.answer, sample.choices)
    except (KeyError, ValueError) as error:
        raise ValueError(f"sample {sample.id!r}: check {sample.check!r}: {error}") from None


def _reasoning_present(sample: Sample, reward: RewardConfig) -> float:
    reply = split_reply(sample.written)
    return float(reply.answer is not None and any(character.isalnum() for character in reply.reasoning))


def _length(sample: Sample, reward: RewardConfig) -> float:
    outside = max(reward.min_tokens - sample.tokens, sample.tokens - reward.max_tokens, 0)
    return -min(1.0, outside / reward.slack_tokens)


KINDS = {
    "preference": Kind(lambda s: s.judgment is not None and not s.judgment.pair.rubric, lambda s, _: s.judgment.reward),
    "rubric": Kind(lambda s: s.judgment is not None and bool(s.judgment.pair.rubric), lambda s, _: s.judgment.reward),
    "verifiable": Kind(lambda s: s.answer is not None, _verifiable),
    "reasoning_present": Kind(lambda s: True, _reasoning_present),
    "length": Kind(lambda s: True, _length),
}


@dataclass
class Running:
    """Count, mean and summed squared deviation of all values so far, over all ranks."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, count: float, mean: float, squares: float) -> None:
        """Take in a batch by its own moments (Chan et al. 1979)."""
        total = self.count + count
        if total:
            distance = mean - self.mean
            self.mean += distance * count / total
            self.squares += squares + distance**2 * self.count * count / total
            self.count = total

    def normalise(self, value: float) -> float:
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return min(max((value - self.mean) / max(deviation, _SMALLEST_DEVIATION), -_CLIP), _CLIP)


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch.

    Attributes:
        values: `[samples]` float64; zero where not valid.
        valid: `[samples]` bool; False where a judgment failed.
        sums: of each kind `[4]` float64: samples with a value, failed ones, summed values, summed contributions to the score.
            Ranks add them up before anything is divided.
    """

    values: torch.Tensor
    valid: torch.Tensor
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


class Rewards:
    """The configured mixture, with the running statistics of its normalised kinds.

    Raises:
        ConfigError: no kind, a kind twice, or a range of lengths that is none.
    """

    def __init__(self, rewards: Sequence[RewardConfig]):
        kinds = [reward.kind for reward in rewards]
        if not kinds or len(set(kinds)) < len(kinds):
            raise ConfigError(f"rl.rewards names the kinds {kinds}: name at least one, and none twice")
        for reward in rewards:
            if reward.kind == "length" and not (0 <= reward.min_tokens <= reward.max_tokens and reward.slack_tokens > 0):
                raise ConfigError(
                    f"rl.rewards: a length reward needs 0 <= min_tokens <= max_tokens and slack_tokens > 0, not {reward}"
                )
        self.rewards = list(rewards)
        self.running = {reward.kind: Running() for reward in rewards if reward.normalise}

    def __call__(self, samples: Sequence[Sample], group: dist.ProcessGroup | None = None) -> Scores:
        """Score a batch; the statistics take it in first. Every rank of `group` calls this, with or without samples.

        Args:
            group: a gloo group, for the numbers are on the host; None for one process.

        Raises:
            ValueError: a sample that no kind applies to, or an answer that its check cannot use.
        """
        values, applies = self._values(samples)
        scores = torch.zeros(len(samples), dtype=torch.float64)
        known = ~values.isnan()
        sums = {}
        for row, reward in enumerate(self.rewards):
            raw, present = values[row], applies[row] & known[row]
            weighed = raw
            if reward.normalise:
                running = self.running[reward.kind]
                running.update(*moments(raw, present, group).tolist())
                weighed = torch.tensor([running.normalise(value) for value in raw.tolist()], dtype=torch.float64)
            contribution = torch.where(present, reward.weight * weighed, 0.0)
            scores += contribution
            failed = applies[row] & ~known[row]
            sums[reward.kind] = torch.stack(
                (present.sum(), failed.sum(), torch.where(present, raw, 0.0).sum(), contribution.sum())
            ).double()
        valid = (known | ~applies).all(0)
        return Scores(torch.where(valid, scores, 0.0), valid, sums)

    def _values(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Value of every kind and sample (NaN where the judgment failed), and whether it applies; `[kinds, samples]`."""
        values = torch.full((len(self.rewards), len(samples)), math.nan, dtype=torch.float64)
        applies = torch.zeros(values.shape, dtype=torch.bool)
        for column, sample in enumerate(samples):
            for row, reward in enumerate(self.rewards):
                if applied(reward, sample):
                    applies[row, column] = True
                    value = KINDS[reward.kind].value(sample, reward)
                    values[row, column] = math.nan if value is None else value
            if not applies[:, column].any():
                raise ValueError(
                    f"sample {sample.id!r} has nothing that rl.rewards rewards ({', '.join(r.kind for r in self.rewards)}): "
                    "give it a reference or an answer, or add its kind"
                )
        return values, applies

    def state_dict(self) -> dict[str, list[float]]:
        return {kind: [running.count, running.mean, running.squares] for kind, running in self.running.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from a checkpoint; a kind that is new since then starts afresh."""
        for kind, numbers in state.items():
            if kind in self.running:
                self.running[kind] = Running(*numbers)


def applied(reward: RewardConfig, sample: Sample) -> bool:
    """Whether a configured reward applies to a sample."""
    within = not reward.only_with or any(KINDS[kind].applies(sample) for kind in reward.only_with)
    return within and KINDS[reward.kind].applies(sample)
