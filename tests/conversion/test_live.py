"""A model in memory as a folder that transformers loads: the same logits, vocabulary padding and adapters seen to."""

import torch
from support.decoder_twins import VOCABULARY, huggingface_twin, model_of_twin, random_tokens, small_config, twin_logits

from step_megatron.config.schema import LoRAConfig
from step_megatron.conversion.live import write_decoder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_transformers_loads_what_was_written(runtime, tmp_path):
    for name, settings in {"qwen2": {}, "llama": {"qkv_bias": False, "tied": True}}.items():
        config = small_config(**settings)
        twin = huggingface_twin(config)
        (tmp_path / name).mkdir()
        write_decoder(tmp_path / name, model_of_twin(config, twin), config)
        peer = loaded(tmp_path / name)
        assert peer.config.model_type == name
        weights = peer.state_dict()
        assert all(torch.equal(weights[key], value) for key, value in twin.state_dict().items())


def test_adapters_are_merged(runtime, tmp_path):
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.batch import make_batch
    from step_megatron.model.lora import is_adapter

    config = small_config()
    config.model.lora = LoRAConfig(rank=3, alpha=6.0)
    (model,) = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(0, 0.2)
    write_decoder(tmp_path, model, config)
    tokens = random_tokens(12)
    with torch.no_grad():
        ours = model(make_batch(tokens, [12]))
    torch.testing.assert_close(twin_logits(loaded(tmp_path), tokens, [12]), ours, atol=1e-5, rtol=0)


def written_in_layout(rank, world_size, *, folder):
    from pathlib import Path

    from step_megatron.runtime.device import initialize

    # An odd vocabulary: two ranks pad it.
    config = small_config(tensor_model_parallel_size=2)
    config.model.vocabulary_size = VOCABULARY - 1
    initialize(config)
    write_decoder(Path(folder), model_of_twin(config, huggingface_twin(config)), config)


def test_ranks_write_it_together_without_the_padding(worker_pool, tmp_path):
    worker_pool(2).run(written_in_layout, {"folder": str(tmp_path)})
    config = small_config()
    config.model.vocabulary_size = VOCABULARY - 1
    weights = loaded(tmp_path).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in huggingface_twin(config).state_dict().items())
