"""Rewards and advantages equal slow loops in float64; failed samples are in nobody's baseline."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels.segments import cumulative

from step_megatron.rl.advantages import critic_advantages, group_relative, leave_one_out, token_rewards
from tests.rl.packed_cases import batches, packed

groups = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8)


def test_reward_is_on_the_last_token_and_the_penalty_on_every_one():
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], requires_grad=True)
    rewards = token_rewards(torch.tensor([1.0, 9.0, -2.0]), cumulative([2, 0, 3]), kl, beta=0.5)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 1 - 0.1, -0.15, -0.2, -2 - 0.25]))
    assert not rewards.requires_grad
    assert token_rewards(torch.tensor([1.0, 9.0, -2.0]), cumulative([2, 0, 3]), tokens=5).tolist() == [0, 1, 0, 0, -2]


@given(batches, st.sampled_from([(1.0, 1.0), (1.0, 0.95), (0.9, 0.8)]))
def test_advantages_equal_the_loop_over_padded_rows(batch, discount):
    """Against the padded form as TRL and verl publish it: rows of responses, a mask, one reverse loop over columns."""
    gamma, lam = discount
    (rewards, values), _, cu_seqlens = packed(batch, columns=2)
    advantages, returns = critic_advantages(rewards, values, cu_seqlens, gamma, lam)
    lengths = cu_seqlens.diff().tolist()
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        row_rewards, row_values = ([0.0] * max(lengths) for _ in range(2))
        row_rewards[:length] = rewards[start : start + length].tolist()
        row_values[:length] = values[start : start + length].tolist()
        next_value = advantage = 0.0
        for t in reversed(range(max(lengths))):
            present = t < length
            delta = row_rewards[t] + gamma * next_value - row_values[t]
            advantage = delta + gamma * lam * advantage if present else advantage
            next_value = row_values[t] if present else next_value
            if present:
                assert advantages[start + t] == pytest.approx(advantage, rel=1e-9, abs=1e-12)
                assert returns[start + t] == pytest.approx(advantage + row_values[t], rel=1e-9, abs=1e-12)


def members_of(number, batch, scores):
    return [s for s, (group, valid) in zip(scores, batch, strict=True) if group == number and valid]


@given(groups, st.booleans())
def test_group_relative_equals_the_loop(batch, divide):
    scores = torch.randn(len(batch), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    group, valid = torch.tensor([g for g, _ in batch]), torch.tensor([v for _, v in batch])
    actual = group_relative(scores, group, valid, 3, divide)
    for i, (number, counts) in enumerate(batch):
        others = members_of(number, batch, scores.tolist())
        expected = 0.0
        if counts and len(others) > 1:
            mean = sum(others) / len(others)
            deviation = math.sqrt(sum((s - mean) ** 2 for s in others) / (len(others) - 1))
            expected = (scores[i].item() - mean) / (deviation + 1e-6 if divide else 1)
        assert actual[i].item() == pytest.approx(expected, abs=1e-9)


@given(groups)
def test_leave_one_out_equals_the_loop(batch):
    scores = torch.randn(len(batch), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    group, valid = torch.tensor([g for g, _ in batch]), torch.tensor([v for _, v in batch])
    actual = leave_one_out(scores, group, valid, 3)
    for i, (number, counts) in enumerate(batch):
        others = [s.item() for j, s in enumerate(scores) if j != i and batch[j] == (number, True)]
        expected = scores[i].item() - sum(others) / len(others) if counts and others else 0.0
        assert actual[i].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("baseline", [group_relative, leave_one_out])
def test_a_failed_sample_changes_nobodys_advantage(baseline):
    scores, group = torch.tensor([1.0, 3.0, torch.nan, 4.0]), torch.tensor([0, 0, 0, 1])
    valid = torch.tensor([True, True, False, True])
    advantages = baseline(scores, group, valid, 2)
    assert advantages[2:].tolist() == [0, 0] and advantages[0] == -advantages[1] < 0
    assert torch.equal(advantages[:2], baseline(scores[:2], group[:2], valid[:2], 2))
