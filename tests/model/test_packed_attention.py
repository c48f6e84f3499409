"""Packed attention and rotary embedding against their definitions; zigzag pieces put together give the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.model.attention import attend_zigzag
from step_megatron.model.rope import RotaryTable, apply_rotary
from step_megatron.model.segments import pack_segments, zigzag_positions

HEADS, GROUPS, WIDTH = 4, 2, 8


def causal_float64(query, key, value, lengths):
    """Softmax attention in float64, one segment and one head at a time."""
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[start : start + length].double() for x in (query, key, value))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = q[:, head] @ k[:, group].T * WIDTH**-0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, group])
        outputs.append(torch.stack(heads, 1))
        start += length
    return torch.cat(outputs)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([2, 3]))
def test_context_parallel_pieces_put_together_are_causal_attention(pieces, size):
    lengths = [piece * 2 * size for piece in pieces]
    generator = torch.Generator().manual_seed(sum(lengths))
    query, key, value = (torch.randn(sum(lengths), n, WIDTH, generator=generator) for n in (HEADS, GROUPS, GROUPS))
    out = torch.empty_like(query)
    gathered = []
    for rank in range(size):
        packed = pack_segments(lengths, cp_size=size, cp_rank=rank)
        out[packed.cp_index] = attend_zigzag(query[packed.cp_index], key, value, packed, WIDTH**-0.5)
        gathered.append(key[packed.cp_index])
        assert torch.equal(packed.position_ids, pack_segments(lengths).position_ids[packed.cp_index])
    # What the ranks gather, rank after rank, is put back into natural order.
    assert torch.equal(torch.cat(gathered)[packed.cp_restore], key)
    torch.testing.assert_close(out.double(), causal_float64(query, key, value, lengths), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 8), st.integers(1, 4))
def test_zigzag_shares_the_triangle_equally(piece, size):
    parts = [zigzag_positions(piece * 2 * size, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == list(range(piece * 2 * size))
    assert len({int((part + 1).sum()) for part in parts}) == 1, "each rank does the same work"


def test_positions_start_again_in_every_segment():
    packed = pack_segments([3, 1, 2])
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 6] and packed.max_seqlen_q == 3 and packed.total == 6


@pytest.mark.parametrize("lengths", [[], [3, 0], [4, -1]])
def test_empty_segments_are_refused(lengths):
    with pytest.raises(ValueError, match="positive"):
        pack_segments(lengths)


def test_a_segment_that_context_parallelism_cannot_cut_is_refused():
    with pytest.raises(ValueError, match="6 tokens .* 2 context-parallel ranks: pad it to a multiple of 4"):
        pack_segments([8, 6], cp_size=2)


def test_rotary_equals_transformers():
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding, apply_rotary_pos_emb

    config = Qwen2Config(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    positions = torch.tensor([0, 1, 2, 0, 500, 1023])
    x = torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = Qwen2RotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    actual, _ = apply_rotary(x, x, RotaryTable(16, 1024, 1e6)(positions, torch.float32))
    torch.testing.assert_close(actual, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_a_rotated_product_depends_on_the_distance_only():
    table = RotaryTable(16, 64, 1e4)
    a, b = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(1))

    def product(i, j):
        turned = [apply_rotary(x, x, table(torch.tensor([p]), torch.float32))[0] for x, p in ((a, i), (b, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(3, 10), product(40, 47), rtol=1e-4, atol=1e-4)
    assert (product(3, 10) - product(3, 20)).abs() > 1e-3
