"""Mixed rewards: each kind applies where it should, is normalised by its own statistics, resumes, and is the same over ranks."""

import statistics

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.config.load import ConfigError, load_config
from step_megatron.config.rl import RewardConfig
from step_megatron.config.schema import Config, RunConfig
from step_megatron.rl.judge.judging import Judgment
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.rewards import Rewards, Sample
from step_megatron.runtime.device import initialize


def judged(reward: float | None, rubric: bool = False, **sample) -> Sample:
    pair = Pair("p", (), "a", "b", ("c",) if rubric else ())
    return Sample("s", "r</think>a", 5, Judgment(pair, reward), **sample)


def checked(written: str, answer: str = "4", check: str = "numeric") -> Sample:
    return Sample("s", written, 5, answer=answer, check=check)


def test_the_recipe_of_step_audio_r1():
    config = load_config(None, ["rl.rewards=[{kind: verifiable, weight: 0.8}, {kind: reasoning_present, weight: 0.2}]"])
    samples = [checked(text) for text in ("2 + 2</think>4", "\n</think>4", "2 + 2</think>5", "…</think>5", "2 + 2 = 4")]
    scores = Rewards(config.rl.rewards)(samples)
    assert scores.values.tolist() == pytest.approx([1.0, 0.8, 0.2, 0.0, 0.0]) and scores.valid.all()
    assert scores.sums["verifiable"].tolist() == pytest.approx([5, 0, 2, 1.6])
    assert scores.sums["reasoning_present"].tolist() == pytest.approx([5, 0, 2, 0.4])


def test_kinds_are_normalised_apart_so_that_none_rules_the_batch():
    """Rubric rewards are spread ten times wider; normalised apart, both kinds are spread alike."""
    generator = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(2, 200, dtype=torch.float64, generator=generator)
    samples = [judged(x) for x in (0.5 + 0.05 * narrow).tolist()] + [judged(x, rubric=True) for x in (0.5 * wide).tolist()]
    scores = Rewards(Config().rl.rewards)(samples).values
    for part in (scores[:200], scores[200:]):
        assert part.mean().item() == pytest.approx(0, abs=1e-9) and part.std().item() == pytest.approx(1, abs=1e-9)
    plain = Rewards([RewardConfig("preference"), RewardConfig("rubric")])(samples).values
    assert plain[200:].std() > 8 * plain[:200].std()


def test_a_failed_judgment_leaves_the_sample_without_a_score_and_the_others_alone():
    rewards = [RewardConfig("preference", normalise=True), RewardConfig("length", weight=0.5, max_tokens=0, slack_tokens=10)]
    with_failure = Rewards(rewards)([judged(0.5), judged(None), judged(-0.5)])
    without = Rewards(rewards)([judged(0.5), judged(-0.5)])
    assert with_failure.valid.tolist() == [True, False, True]
    assert with_failure.values[[0, 2]].tolist() == without.values.tolist() and with_failure.values[1] == 0
    assert with_failure.sums["preference"][:2].tolist() == [2, 1]


@given(st.lists(st.lists(st.floats(-1, 1), max_size=5), min_size=1, max_size=5))
def test_running_statistics_are_those_of_all_values_and_resume(batches):
    rewards = Rewards([RewardConfig("preference", normalise=True)])
    for number, batch in enumerate(batches):
        rewards([judged(x) for x in batch])
        if number == len(batches) // 2:
            state, rewards = rewards.state_dict(), Rewards(rewards.rewards)
            rewards.load_state_dict(state)
    values = [x for batch in batches for x in batch]
    running = rewards.running["preference"]
    assert running.count == len(values)
    if values:
        assert running.mean == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert running.squares == pytest.approx(sum((x - statistics.fmean(values)) ** 2 for x in values), abs=1e-12)


def test_a_rare_value_after_equal_ones_is_bounded():
    rewards = Rewards([RewardConfig("preference", normalise=True)])
    rewards([judged(0.0)] * 1000)
    assert rewards([judged(1.0), judged(0.0)]).values.tolist() == pytest.approx([5.0, -0.03], abs=0.02)


def test_one_sample_or_equal_ones_are_worth_nothing_when_normalised():
    rewards = Rewards([RewardConfig("preference", normalise=True)])
    assert rewards([judged(0.7)]).values.tolist() == [0]
    assert rewards([judged(0.7)] * 3).values.tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def score_share(rank: int, world_size: int):
    initialize(Config(run=RunConfig(threads=1)))
    rewards = Rewards(Config().rl.rewards)
    values = [0.3, -0.2, 0.9, None, 0.1]
    # The second rank has no rubric sample, and still takes part.
    samples = [judged(x) for x in values[rank::2]] + ([judged(0.4, rubric=True), judged(0.8, rubric=True)] if rank == 0 else [])
    return rewards(samples, dist.group.WORLD).values, rewards.state_dict()


def test_ranks_score_as_one(worker_pool):
    values = [0.3, -0.2, 0.9, None, 0.1]
    expected = Rewards(Config().rl.rewards)
    scores = expected([judged(x) for x in values] + [judged(0.4, rubric=True), judged(0.8, rubric=True)]).values
    for rank, (share, state) in enumerate(worker_pool(2).run(score_share)):
        torch.testing.assert_close(share[: len(values[rank::2])], scores[: len(values)][rank::2], rtol=1e-12, atol=1e-12)
        for kind, numbers in expected.state_dict().items():
            assert state[kind] == pytest.approx(numbers, rel=1e-12)


def test_length_is_free_in_its_range_and_costs_at_most_one_outside():
    reward = RewardConfig("length", min_tokens=10, max_tokens=20, slack_tokens=5)
    samples = [Sample("s", "x", tokens) for tokens in (0, 8, 10, 20, 22, 1000)]
    assert Rewards([reward])(samples).values.tolist() == pytest.approx([-1, -0.4, 0, 0, -0.4, -1])


def test_a_term_may_be_for_some_kinds_only():
    rewards = [
        RewardConfig("preference"),
        RewardConfig("verifiable"),
        RewardConfig("reasoning_present", 0.2, only_with=["verifiable"]),
    ]
    scores = Rewards(rewards)([judged(0.5), checked("2 + 2</think>4"), judged(0.5, answer="a")])
    assert scores.values.tolist() == pytest.approx([0.5, 1.2, 1.7])


@pytest.mark.parametrize(
    "rewards",
    [[], [RewardConfig("length"), RewardConfig("length")], [RewardConfig("length", min_tokens=9, max_tokens=3)]],
)
def test_a_mixture_that_means_nothing_is_refused(rewards):
    with pytest.raises(ConfigError, match="rl.rewards"):
        Rewards(rewards)


def test_samples_that_cannot_be_rewarded_are_named():
    with pytest.raises(ValueError, match="'s' has nothing that rl.rewards rewards"):
        Rewards([RewardConfig("verifiable")])([judged(0.5)])
    with pytest.raises(ValueError, match="'s': check 'numeric': the answer 'many'"):
        Rewards([RewardConfig("verifiable")])([checked("x</think>4", "many")])
    with pytest.raises(ConfigError, match="must be one of preference"):
        load_config(None, ["rl.rewards=[{kind: politeness}]"])
