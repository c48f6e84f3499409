"""Freezing by pattern: what matches stops training, what matches nothing is an error with the nearest names."""

import pytest
from support.decoder_twins import small_config


@pytest.fixture
def model(runtime):
    from step_megatron.model.audio_lm import build_model

    (model,) = build_model(small_config())
    return model


def test_matching_parameters_stop_training(model):
    from step_megatron.model.freeze import freeze

    frozen = freeze([model], ["language_model.decoder.layers.1.*", "*word_embeddings*"])
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(frozen)
    assert "language_model.embedding.word_embeddings.weight" in frozen
    assert all("layers.1." in name for name in frozen if "layers" in name)


def test_a_pattern_that_matches_nothing_is_an_error(model):
    from step_megatron.model.freeze import freeze

    with pytest.raises(
        ValueError, match=r"'language_model.decoder.layer.0.mlp.*' matches no parameter; nearest: .*mlp.linear_fc"
    ):
        freeze([model], ["adaptor.*", "language_model.decoder.layer.0.mlp.*"])
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing may be frozen when a pattern is wrong"


def test_freezing_everything_is_an_error(model):
    from step_megatron.model.freeze import freeze

    with pytest.raises(ValueError, match="nothing to train"):
        freeze([model], ["adaptor.*", "language_model.*"])


def freeze_in_pipeline(rank, world_size, patterns):
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.freeze import freeze
    from step_megatron.runtime.device import initialize

    config = small_config(pipeline_model_parallel_size=2)
    runtime = initialize(config)
    try:
        return freeze(build_model(config), patterns, runtime.control_group)
    except ValueError as error:
        return str(error)


def test_stages_agree_on_what_exists(worker_pool):
    first, second = worker_pool(2).run(freeze_in_pipeline, {"patterns": ["adaptor.*", "*.layers.1.*"]})
    assert set(first) == {f"adaptor.{name}" for name in ADAPTOR}
    assert second and all(name.startswith("language_model.decoder.layers.1.") for name in second)
    first, second = worker_pool(2).run(freeze_in_pipeline, {"patterns": ["*.layers.2.*"]})
    assert first == second and "matches no parameter" in first


ADAPTOR = ("conv.weight", "conv.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias")
