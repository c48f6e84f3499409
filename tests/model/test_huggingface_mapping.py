"""Weights under Hugging Face's names: there and back, cut for tensor parallelism and put together, wrong input named."""

import pytest
import torch
from support.decoder_twins import huggingface_twin, small_config

from step_megatron.model import weights
from step_megatron.model.decoder import transformer_config
from step_megatron.model.huggingface import from_huggingface, to_huggingface


@pytest.mark.parametrize("tied, qkv_bias", [(False, True), (True, True), (False, False)])
def test_there_and_back(tied, qkv_bias):
    config = small_config(tied, qkv_bias)
    state = {name: parameter.data for name, parameter in huggingface_twin(config).named_parameters()}
    transformer = transformer_config(config)
    back = to_huggingface(from_huggingface(state, transformer, tied), transformer, tied)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_make_the_whole(size):
    config = small_config(num_query_groups=4)
    full = from_huggingface(huggingface_twin(config).state_dict(), transformer_config(config), False)
    for name, tensor in full.items():
        shards = [weights.shard(name, tensor, rank, size) for rank in range(size)]
        assert torch.equal(weights.merge(name, shards), tensor), name
        if weights.cut_dimension(name) is not None:
            assert all(shard.numel() * size == tensor.numel() for shard in shards), name


def test_every_rank_gets_a_part_of_gate_and_of_up():
    gate, up = torch.zeros(8, 3), torch.ones(8, 3)
    for rank in range(2):
        shard = weights.shard("decoder.layers.0.mlp.linear_fc1.weight", torch.cat([gate, up]), rank, 2)
        assert torch.equal(shard, torch.cat([gate[:4], up[:4]]))


def test_a_missing_tensor_is_named():
    config = small_config()
    state = dict(huggingface_twin(config).state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    del state["model.norm.weight"]
    message = r"missing: model\.layers\.1\.mlp\.up_proj\.weight \[160, 64\]\nmissing: model\.norm"
    with pytest.raises(ValueError, match=message):
        from_huggingface(state, transformer_config(config), False)


def test_other_heads_are_named():
    state = huggingface_twin(small_config()).state_dict()
    with pytest.raises(ValueError, match=r"k_proj.weight is \[32, 64\], the configuration wants \[64, 64\]"):
        from_huggingface(state, transformer_config(small_config(num_query_groups=4)), False)


def test_weights_of_another_vocabulary_are_named(runtime):
    from step_megatron.model.audio_lm import build_model

    config = small_config()
    full = from_huggingface(huggingface_twin(config).state_dict(), transformer_config(config), False)
    config.model.vocabulary_size = 96
    (model,) = build_model(config)
    with pytest.raises(ValueError, match=r"word_embeddings.weight: the model has shape \(96, 64\) here, the weights \(128, 64\)"):
        weights.load([model.language_model], full)
