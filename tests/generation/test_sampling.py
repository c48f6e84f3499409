"""Random numbers, and the choice of tokens beside transformers and beside the distribution itself."""

import dataclasses

import pytest
import torch
from step_kernels.draw_tokens import uniform
from support.rollouts import splitmix

from step_megatron.generation.sampling import Needs, RowSettings, choose


def settings(rows: int, **changed) -> RowSettings:
    plain = {
        "temperature": torch.ones(rows),
        "top_p": torch.ones(rows),
        "top_k": torch.zeros(rows, dtype=torch.int64),
        "penalty": torch.ones(rows),
        "seeds": torch.arange(rows),
        "draws": torch.zeros(rows, dtype=torch.int64),
        "forced": torch.full((rows,), -1),
        "banned": torch.zeros(rows, 1, dtype=torch.int64),
        "ban": torch.zeros(rows, 1),
    }
    return RowSettings(**plain | changed)


def test_numbers_are_splitmixs():
    seeds = torch.tensor([0, 1, 2**62, 2**63 - 1, 123456789])
    for draw in (0, 1, 1000):
        expected = [splitmix(int(seed), draw) for seed in seeds]
        assert uniform(seeds, torch.full_like(seeds, draw)).tolist() == expected


@pytest.mark.parametrize("along", ["seeds", "draws"])
def test_numbers_are_uniform_and_unrelated(along):
    n = 100_000
    counter, fixed = torch.arange(n), torch.full((n,), 7)
    numbers = uniform(counter, fixed) if along == "seeds" else uniform(fixed, counter)
    counts = torch.histc(numbers, 100, 0, 1)
    # Chi-squared with 99 degrees of freedom is above 148 once in a thousand.
    assert float(((counts - n / 100) ** 2 / (n / 100)).sum()) < 148
    related = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(float(related)) < 0.012


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.7)])
def test_draws_follow_what_transformers_leaves_of_the_distribution(top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    n, temperature = 20_000, 0.7
    logits = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.19, 0.01]).log()
    rows = settings(
        n,
        temperature=torch.full((n,), temperature),
        top_k=torch.full((n,), top_k),
        top_p=torch.full((n,), top_p),
    )
    tokens, logprobs = choose(logits.repeat(n, 1), rows, Needs(draws=True, truncates=top_k > 0 or top_p < 1))
    left = TemperatureLogitsWarper(temperature)(None, logits[None])
    policy = left.log_softmax(-1)[0]
    if top_k:
        left = TopKLogitsWarper(top_k)(None, left)
    if top_p < 1:
        left = TopPLogitsWarper(top_p)(None, left)
    expected = left.softmax(-1)[0]
    counts = torch.bincount(tokens, minlength=6)
    torch.testing.assert_close(counts / n, expected, rtol=0, atol=0.015)
    assert not counts[expected == 0].any()
    torch.testing.assert_close(logprobs, policy[tokens])


def test_a_penalty_moves_the_choice_and_not_the_policy():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    prompts = torch.randint(0, 30, (50, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(50, 30, dtype=torch.bool).scatter_(1, prompts, True)
    rows = settings(50, temperature=torch.zeros(50), penalty=torch.full((50,), 1.8), seen=seen)
    tokens, logprobs = choose(logits, rows, Needs(penalises=True))
    expected = RepetitionPenaltyLogitsProcessor(1.8)(prompts, logits.clone()).argmax(-1)
    assert torch.equal(tokens, expected) and not torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))


def test_rows_of_every_kind_share_a_batch():
    """What is computed because a neighbour needs it changes nothing for the others."""
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    seen = torch.zeros(4, 40, dtype=torch.bool)
    mixed = settings(
        4,
        temperature=torch.tensor([0.0, 1.0, 0.8, 1.2]),
        top_k=torch.tensor([0, 0, 5, 0]),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.5]),
        penalty=torch.tensor([1.0, 1.0, 1.0, 1.5]),
        seen=seen,
    )
    every = Needs(draws=True, truncates=True, penalises=True, bans=True)
    tokens, logprobs = choose(logits, mixed, every)
    alone = [Needs(), Needs(draws=True), Needs(draws=True, truncates=True), Needs(draws=True, truncates=True, penalises=True)]
    for row, needs in enumerate(alone):
        one = dataclasses.replace(mixed, **{k: v[row : row + 1] for k, v in vars(mixed).items()})
        token, logprob = choose(logits[row : row + 1], one, needs)
        assert token == tokens[row]
        torch.testing.assert_close(logprob, logprobs[row : row + 1])


def test_the_largest_number_still_draws_a_token_that_can_come():
    """Rounding must not bring it to the end of the row, where tokens of no weight stand."""
    logits = torch.zeros(1, 1000)
    logits[:, 500:] = -torch.inf
    largest = next(seed for seed in range(10**7) if splitmix(seed, 0) > 1 - 2.0**-18)
    tokens, _ = choose(logits, settings(1, seeds=torch.tensor([largest])), Needs(draws=True))
    assert tokens.item() == 499


def test_bans_and_forced_tokens():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3)
    rows = settings(
        3,
        temperature=torch.zeros(3),
        banned=torch.tensor([[1], [1], [0]]),
        ban=torch.tensor([[-torch.inf], [0.0], [0.0]]),
        forced=torch.tensor([-1, -1, 0]),
    )
    tokens, logprobs = choose(logits, rows, Needs(bans=True))
    assert tokens.tolist() == [2, 1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))
