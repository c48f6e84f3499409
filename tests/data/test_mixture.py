"""The mixture: shares of trained tokens as the weights say, every sample once an epoch, exact positions."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.mixture import Mixture, Source, shuffled

sources = st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 20)), min_size=1, max_size=4).map(
    lambda made: [Source(f"s{i}", weight, size) for i, (weight, size) in enumerate(made)]
)


def draw(mixture: Mixture, tokens) -> tuple[int, int]:
    source = mixture.choose()
    sample = mixture.advance(source)
    mixture.credit(source, tokens(source, sample))
    return source, sample


def count(source: int, sample: int) -> int:
    """Trained tokens of a sample, 1 to 50."""
    return 1 + (17 * source + 31 * sample) % 50


@given(sources, st.integers(0, 5))
def test_shares_of_trained_tokens_are_the_weights(made, seed):
    mixture = Mixture(made, seed)
    total = sum(source.weight for source in made)
    for _ in range(600):
        draw(mixture, count)
        given_so_far = sum(mixture.tokens)
        for source, tokens in zip(made, mixture.tokens, strict=True):
            # Ahead by at most one sample; behind by at most what the others can be ahead.
            assert tokens - given_so_far * source.weight / total <= 50 + 1e-6
            assert given_so_far * source.weight / total - tokens <= 50 * (len(made) - 1) + 1e-6


@given(sources, st.integers(0, 5))
def test_every_sample_once_an_epoch(made, seed):
    mixture = Mixture(made, seed)
    seen = [[] for _ in made]
    for _ in range(300):
        source, sample = draw(mixture, count)
        seen[source].append(sample)
    for source, samples in zip(made, seen, strict=True):
        for start in range(0, len(samples), source.size):
            epoch = samples[start : start + source.size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < source.size or sorted(epoch) == list(range(source.size))


def test_epochs_sources_and_seeds_are_shuffled_differently():
    def orders(seed: int, name: str) -> list[list[int]]:
        mixture = Mixture([Source(name, 1.0, 50)], seed)
        return [[mixture.advance(0) for _ in range(50)] for _ in range(2)]

    first, second = orders(0, "a")
    assert first != second and first != list(range(50))
    assert first not in orders(1, "a") and first not in orders(0, "b")
    assert orders(0, "a") == [first, second]


@given(sources, st.integers(0, 200))
def test_position_resumes_exactly(made, draws):
    mixture = Mixture(made, 3)
    for _ in range(draws):
        draw(mixture, count)
    other = Mixture(made, 3)
    other.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert [draw(mixture, count) for _ in range(60)] == [draw(other, count) for _ in range(60)]
    assert mixture.state_dict() == other.state_dict()


def test_epochs_are_reported_by_name():
    mixture = Mixture([Source("a", 1.0, 4)], 0)
    for _ in range(6):
        mixture.advance(0)
    assert mixture.epochs() == {"a": 1.5}


@given(st.integers(0, 300), st.integers(0, 9))
def test_shuffle_is_a_permutation(size, seed):
    assert sorted(shuffled(size, seed, 1).tolist()) == list(range(size))


def test_shuffle_is_stable_and_even():
    """Pinned: a resumed run must see the order that it was started with, whatever release of numpy it resumes on."""
    assert shuffled(8, 1234, 5).tolist() == [1, 0, 5, 4, 2, 3, 6, 7]
    counts = np.zeros((6, 6), int)
    for seed in range(3000):
        counts[np.arange(6), shuffled(6, seed)] += 1
    # Each cell is binomial(3000, 1/6): mean 500, standard deviation 20.4; five of them.
    assert abs(counts - 500).max() < 102


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "data.sources is empty"),
        ([Source("a", 1, 3), Source("a", 1, 3)], "'a' is empty or used twice"),
        ([Source("", 1, 3)], "'' is empty"),
        ([Source("a", 0, 3)], "'a' has weight 0"),
        ([Source("a", float("nan"), 3)], "'a' has weight nan"),
        ([Source("a", 1, 0)], "'a' has no usable sample"),
    ],
)
def test_unsound_mixture_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        Mixture(made, 0)
