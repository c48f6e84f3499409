"""Configuration and size of the decoder: Megatron's fields pass through checked, presets have the published parameter counts."""

import pytest
import torch
from support.decoder_twins import small_config

from step_megatron.config.load import load_config
from step_megatron.model.decoder import transformer_config

MILLION = 1e6


def test_yaml_values_become_what_megatron_wants():
    config = transformer_config(small_config(params_dtype="bfloat16", attention_backend="unfused"))
    assert config.params_dtype is torch.bfloat16 and config.pipeline_dtype is torch.bfloat16
    assert config.attention_backend.name == "unfused"
    assert config.calculate_per_token_loss and config.variable_seq_lengths
    assert transformer_config(small_config(bf16=True)).params_dtype is torch.bfloat16
    assert transformer_config(small_config()).params_dtype is torch.float32


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"num_layer": 3}, "num_layer: .*did you mean num_layers"),
        ({"params_dtype": "bfloat61"}, "params_dtype='bfloat61'.*bfloat16"),
        ({"attention_backend": "flush"}, "attention_backend='flush'.*flash"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1: dropout is not supported"),
        ({"num_layers": 0}, "num_layers is not set"),
        ({"num_query_groups": 3}, "num_query_groups=3 does not divide num_attention_heads=4"),
        ({"recompute_granularity": "ful"}, "Megatron-Core refuses"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        transformer_config(small_config(**setting))


def test_what_megatron_recomputes_with_transformer_engine_only_is_refused():
    with pytest.raises(ValueError, match="recomputes layernorm with Transformer Engine only"):
        transformer_config(small_config(recompute_granularity="selective", recompute_modules=["layernorm"]))


def test_messages_that_two_interleaved_stages_would_mix_up_are_refused():
    two = {"num_layers": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    assert transformer_config(small_config(**two)).overlap_p2p_comm
    with pytest.raises(ValueError, match="overlap_p2p_comm=false: with virtual stages two pipeline stages mix up messages"):
        transformer_config(small_config(**two, overlap_p2p_comm=False, batch_p2p_comm=True))


def test_a_vocabulary_that_leaves_a_rank_nothing_is_refused(runtime):
    from step_megatron.model.decoder import build_decoder

    config = small_config()
    transformer = transformer_config(config)
    transformer.tensor_model_parallel_size = 100
    with pytest.raises(ValueError, match="vocabulary_size=128 leaves nothing to the last of tensor_model_parallel_size=100"):
        build_decoder(config, transformer)


def test_transformer_engine_layers_are_refused_without_it():
    from step_megatron.model.layers import layer_kind

    if torch.cuda.is_available():
        pytest.skip("this machine may have Transformer Engine")
    with pytest.raises(RuntimeError, match="model.layers=torch"):
        layer_kind("te")
    assert layer_kind("auto") == "torch"


# Qwen2.5-7B, Qwen2.5-0.5B and SmolLM2-135M: counts of the published checkpoints. The others: written out from their sizes.
DECODERS = {
    "step-audio-32b": 2 * 158720 * 5120 + 5120 + 64 * (2 * 5120 + (5120 + 2 * 1024) * 5121 + 5120 * 5120 + 3 * 5120 * 27648),
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "smol-135m": 134_515_008,
    "tiny": 2 * 4096 * 256 + 256 + 4 * (2 * 256 + 512 * 257 + 256 * 256 + 3 * 256 * 768),
}


@pytest.mark.parametrize("preset", DECODERS)
def test_presets_have_the_published_number_of_parameters(runtime, preset):
    from step_megatron.model.audio_lm import build_model

    config = load_config(None, [f"model.preset={preset}"])
    with torch.device("meta"):
        (model,) = build_model(config)
    assert sum(parameter.numel() for parameter in model.language_model.parameters()) == DECODERS[preset]
    width, inner, out = config.encoder.width, config.adaptor.width, model.config.hidden_size
    adaptor = sum(parameter.numel() for parameter in model.adaptor.parameters())
    assert adaptor == width * (3 * width + 1) + inner * (width + 1) + out * (inner + 1)


def test_step_audio_32b_has_the_size_of_the_report(runtime):
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.encoder import AudioEncoder

    config = load_config(None, ["model.preset=step-audio-32b"])
    with torch.device("meta"):
        (model,) = build_model(config)
        encoder = AudioEncoder(config.encoder, block=64)

    def millions(module):
        return sum(parameter.numel() for parameter in module.parameters()) / MILLION

    assert millions(model.adaptor) == pytest.approx(18.0, abs=0.05)
    assert millions(model.language_model) == pytest.approx(32_830, abs=5)
    # The table of positions is frozen, so it may be a buffer.
    positions = sum(buffer.numel() for buffer in encoder.buffers()) / MILLION
    assert millions(encoder) + positions == pytest.approx(637.0, abs=2)
    assert millions(encoder) + millions(model) == pytest.approx(33_490, abs=10)


def test_weights_at_the_start_do_not_depend_on_what_was_built_before(runtime):
    from step_megatron.model.audio_lm import build_model

    config = small_config()
    (first,) = build_model(config)
    state = torch.get_rng_state()
    torch.rand(3)
    (second,) = build_model(config)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    torch.set_rng_state(state)
    (third,) = build_model(config)
    assert torch.equal(torch.get_rng_state(), state), "building a model disturbs the run's random numbers"
    config.run.seed += 1
    (other,) = build_model(config)
    assert not torch.equal(first.adaptor.linear2.weight, other.adaptor.linear2.weight)
    weight = first.language_model.decoder.layers[0].mlp.linear_fc1.weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.1)
