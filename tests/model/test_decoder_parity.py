"""The decoder equals transformers' on the same weights, for packed segments and with audio merged; segments never meet."""

import pytest
import torch
from support.decoder_twins import audio_batch, huggingface_twin, model_of_twin, random_tokens, small_config, twin_logits

from step_megatron.model.batch import make_batch

LENGTHS = [9, 1, 9, 9, 22, 5]


@pytest.mark.parametrize("tied, qkv_bias", [(False, True), (True, True), (False, False)], ids=["qwen2", "qwen2-tied", "llama"])
def test_packed_logits_equal_transformers(runtime, tied, qkv_bias):
    config = small_config(tied, qkv_bias)
    twin = huggingface_twin(config)
    model = model_of_twin(config, twin).eval()
    tokens = random_tokens(sum(LENGTHS))
    with torch.no_grad():
        logits = model(make_batch(tokens, LENGTHS))
    torch.testing.assert_close(logits, twin_logits(twin, tokens, LENGTHS), rtol=0, atol=1e-4)


def test_loss_is_the_cross_entropy_of_the_logits(runtime):
    model = model_of_twin(config := small_config(), huggingface_twin(config)).eval()
    tokens, labels = random_tokens(20), random_tokens(20, seed=1)
    with torch.no_grad():
        losses = model(make_batch(tokens, [12, 8], labels))
        logits = model(make_batch(tokens, [12, 8]))
    expected = torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="none")
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers(runtime):
    config = small_config()
    twin = huggingface_twin(config)
    model = model_of_twin(config, twin)
    tokens, labels = random_tokens(sum(LENGTHS)), random_tokens(sum(LENGTHS), seed=1)
    model(make_batch(tokens, LENGTHS, labels)).sum().backward()
    for part, target in zip(tokens.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True):
        logits = twin(part, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0], target[0], reduction="sum").backward()
    from step_megatron.model.huggingface import gather, to_huggingface

    ours = to_huggingface(gather([model.language_model], "grad"), model.config, tied=False)
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_merged_audio_equals_transformers_given_the_embeddings(runtime):
    config = small_config()
    twin = huggingface_twin(config)
    model = model_of_twin(config, twin).eval()
    lengths = [14, 6, 20]
    batch = audio_batch(lengths, {0: 9, 2: 24})
    batch.labels = None
    with torch.no_grad():
        logits = model(batch)
        embeddings = twin.get_input_embeddings()(batch.tokens)
        embeddings[0, batch.audio_positions] = model.adaptor(batch.audio_features, batch.encoder_frames)
        parts = [twin(inputs_embeds=part, use_cache=False).logits for part in embeddings.split(lengths, dim=1)]
    torch.testing.assert_close(logits, torch.cat(parts, 1), rtol=0, atol=1e-4)
    without = model(make_batch(batch.tokens, lengths))
    assert (logits - without).abs().max() > 1e-2, "the audio changes nothing, so this test proves nothing"


def test_other_content_next_door_changes_nothing_bitwise(runtime):
    model = model_of_twin(config := small_config(), huggingface_twin(config)).eval()
    lengths, own = [11, 13, 13, 7], slice(24, 37)
    tokens = random_tokens(sum(lengths))
    other = random_tokens(sum(lengths), seed=9)
    other[:, own] = tokens[:, own]
    with torch.no_grad():
        before, after = model(make_batch(tokens, lengths)), model(make_batch(other, lengths))
    assert torch.equal(before[:, own], after[:, own])
    assert not torch.equal(before[:, :24], after[:, :24])


@pytest.mark.parametrize("neighbours", [[], [1], [40], [13, 3]])
def test_other_neighbours_change_next_to_nothing(runtime, neighbours):
    model = model_of_twin(config := small_config(), huggingface_twin(config)).eval()
    own, others = random_tokens(13), [random_tokens(n, seed=n) for n in neighbours]
    with torch.no_grad():
        alone = model(make_batch(own, [13]))
        packed = model(make_batch(torch.cat([*others, own, *others], 1), [*neighbours, 13, *neighbours]))
    start = sum(neighbours)
    torch.testing.assert_close(packed[:, start : start + 13], alone, rtol=0, atol=1e-6)


def test_a_text_only_batch_gives_the_adaptor_zero_gradients(runtime):
    model = model_of_twin(config := small_config(), huggingface_twin(config))
    model(audio_batch([8, 8], {})).sum().backward()
    for name, parameter in model.adaptor.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_training_the_adaptor_alone_gives_the_same_gradients_with_recomputation(runtime):
    from step_megatron.model.freeze import freeze

    gradients = []
    for recompute in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        config = small_config(**recompute)
        model = model_of_twin(config, huggingface_twin(config)).train()
        freeze([model], ["language_model.*"])
        model(audio_batch([14, 6, 20], {0: 9, 2: 24})).sum().backward()
        assert all(parameter.grad is None for parameter in model.language_model.parameters())
        gradients.append({name: parameter.grad for name, parameter in model.adaptor.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-6, name
        assert torch.equal(gradient, gradients[1][name]), name


def test_recomputation_trains_layers_behind_frozen_embeddings(runtime):
    """Reentrant recomputation gives no gradient at all when its input needs none."""
    from step_megatron.model.freeze import freeze

    config = small_config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model = model_of_twin(config, huggingface_twin(config)).train()
    freeze([model], ["adaptor.*", "*word_embeddings*"])
    model(audio_batch([8, 8], {0: 5})).sum().backward()
    assert model.language_model.decoder.layers[0].mlp.linear_fc1.weight.grad.abs().max() > 0


def test_megatrons_own_packed_parameters_are_refused(runtime):
    from megatron.core.packed_seq_params import PackedSeqParams

    model = model_of_twin(config := small_config(), huggingface_twin(config))
    attention = model.language_model.decoder.layers[0].self_attention.core_attention
    with pytest.raises(TypeError, match="pack_segments"):
        attention(None, None, None, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
