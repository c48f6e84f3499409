"""Gate and up, stored apart, come into the weight's own memory: no rank has both twice while it loads."""

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from step_megatron.runtime import megatron_reading


@pytest.fixture
def factory(runtime, monkeypatch) -> ShardedTensorFactory:
    """What Megatron makes of a weight of gate and up, as `load` hands it on."""
    weight = torch.arange(48.0).view(12, 4)
    state = {"layers": [{"weight": apply_swiglu_sharded_factory(ShardedTensor.from_rank_offsets("weight", weight), ())}]}
    monkeypatch.setattr(megatron_reading.dist_checkpointing, "load", lambda state, *rest, **options: state)
    return megatron_reading.load(state, "nowhere")["layers"][0]["weight"]


def parts_of(factory: ShardedTensorFactory) -> list[torch.Tensor]:
    return [part.data for part in factory.build()]


def test_parts_that_are_the_weights_own_memory_are_not_copied(factory):
    parts = parts_of(factory)
    assert len(parts) == 2
    parts[1].fill_(7)
    merged = factory.merge_fn(parts)
    assert merged is factory.data and (merged[6:] == 7).all()


def test_parts_from_elsewhere_or_in_another_order_are_put_together(factory):
    first, second = parts_of(factory)
    for parts in ([first, second.clone()], [second, first], [first]):
        merged = factory.merge_fn(list(parts))
        assert torch.equal(merged, torch.cat(parts))
        assert merged.data_ptr() != factory.data.data_ptr() or len(parts) == 1
