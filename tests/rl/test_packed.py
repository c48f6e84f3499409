"""Packed layout: values land on the right tokens; whitening is the textbook's, whatever is masked out or divided."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from step_kernels.segments import cumulative

from step_megatron.config.schema import Config, RunConfig
from step_megatron.rl.packed import moments, on_last_token, spread, whiten
from step_megatron.runtime.device import initialize
from tests.rl.packed_cases import batches, packed


def test_values_of_samples_land_on_their_tokens():
    cu_seqlens = cumulative([0, 2, 0, 3, 0])
    values = torch.tensor([9.0, 1.0, 9.0, 2.0, 9.0])
    assert on_last_token(values, cu_seqlens, 5).tolist() == [0, 1, 0, 0, 2]
    assert spread(values, cu_seqlens, 5).tolist() == [1, 1, 2, 2, 2]
    assert on_last_token(values, cumulative([0] * 5), 0).tolist() == []


@given(batches, st.booleans())
def test_whitening_equals_the_loop(batch, shift):
    (values,), mask, _ = packed(batch)
    values = values * 3 + 100
    kept = [float(v) for v, m in zip(values, mask, strict=True) if m]
    mean = sum(kept) / len(kept)
    # Unbiased variance, as TRL and verl have it.
    variance = sum((v - mean) ** 2 for v in kept) / max(1, len(kept) - 1)
    expected = [(float(v) - mean * shift) / math.sqrt(variance + 1e-8) if m else 0.0 for v, m in zip(values, mask, strict=True)]
    assert whiten(values, mask, shift_mean=shift).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(batches)
def test_what_is_masked_out_changes_nothing(batch):
    (values,), mask, _ = packed(batch)
    expected = whiten(values, mask)
    values[~mask] = torch.nan
    assert torch.equal(whiten(values, mask), expected)
    torch.testing.assert_close(moments(values, mask), moments(values[mask], mask[mask]), rtol=1e-12, atol=1e-12)


def test_float32_values_far_from_zero_keep_their_spread():
    values = 10_000 + torch.tensor([0.0, 0.125, 0.25, 0.375])
    whitened = whiten(values, torch.ones(4, dtype=torch.bool))
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened, whiten(values.double() - 10_000, torch.ones(4, dtype=torch.bool)).float())


def test_one_value_and_none_whiten_to_zero():
    assert whiten(torch.tensor([5.0, 7.0]), torch.tensor([True, False])).tolist() == [0, 0]
    assert whiten(torch.tensor([5.0]), torch.tensor([False])).tolist() == [0]


def whiten_share(rank: int, world_size: int):
    initialize(Config(run=RunConfig(threads=1)))
    (values,), mask, _ = packed([(6, True), (5, False), (4, True)], seed=3)
    share = slice(rank, None, world_size)
    in_common = whiten(values[share], mask[share], group=dist.group.WORLD)
    return in_common, whiten(values[share], mask[share], of=moments(values, mask))


def test_ranks_whiten_as_one(worker_pool):
    (values,), mask, _ = packed([(6, True), (5, False), (4, True)], seed=3)
    expected = whiten(values, mask)
    for rank, results in enumerate(worker_pool(2).run(whiten_share)):
        for result in results:
            torch.testing.assert_close(result, expected[rank::2], rtol=1e-12, atol=1e-12)
