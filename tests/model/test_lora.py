"""LoRA in one process: begins as its base, is its base when it is off, computes and differentiates as peft does."""

import pytest
import torch
from support.decoder_twins import audio_batch, huggingface_twin, model_of_twin, random_tokens, small_config

from step_megatron.config.schema import LoRAConfig
from step_megatron.model.lora import adapters_off, is_adapter

LORA = {"rank": 3, "alpha": 6.0}


def adapted(config, **lora):
    config.model.lora = LoRAConfig(**LORA | lora)
    return config


def liven(model, seed: int = 4) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def test_it_begins_as_its_base_and_is_it_again_when_off(runtime):
    from step_megatron.model.audio_lm import build_model

    batch = audio_batch([9, 20, 5], {1: 23})
    (base,), (model,) = build_model(small_config()), build_model(adapted(small_config()))
    expected = base(batch)
    assert torch.equal(model(batch), expected)
    liven(model)
    changed = model(batch)
    assert (changed - expected).abs().max() > 0.1
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        assert torch.equal(model(batch), expected)
        raise KeyboardInterrupt
    assert torch.equal(model(batch), changed)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("adaptor.") for name in trained if not is_adapter(name))
    assert not all(map(is_adapter, trained)), "the audio adaptor is trained beside it"


def test_logits_and_gradients_are_pefts(runtime):
    from peft import LoraConfig, get_peft_model

    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.batch import make_batch
    from step_megatron.model.huggingface import decoder_entries

    config = adapted(small_config())
    twin = huggingface_twin(config)
    model = model_of_twin(small_config(), twin)
    weights = {name: parameter.data for name, parameter in model.language_model.named_parameters()}
    (model,) = build_model(config)
    model.language_model.load_state_dict(weights, strict=False)
    liven(model)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peer = get_peft_model(twin, LoraConfig(r=3, lora_alpha=6, target_modules=modules))
    theirs = dict(peer.named_parameters())
    ours = dict(model.language_model.named_parameters())
    pairs = []
    for entry in decoder_entries(model.config, 128, tied=False):
        layer = entry.ours.removesuffix("weight")
        if layer + "lora_A" not in ours:
            continue
        names = ["base_model.model." + name.removesuffix("weight") for name, _ in entry.theirs]
        pairs.append((entry, ours[layer + "lora_A"], ours[layer + "lora_B"], names))
        with torch.no_grad():
            for name, part in zip(names, entry.split(ours[layer + "lora_B"]), strict=True):
                theirs[f"{name}lora_A.default.weight"].copy_(ours[layer + "lora_A"])
                theirs[f"{name}lora_B.default.weight"].copy_(part)
    assert len(pairs) == 2 * 4
    tokens = random_tokens(20)
    logits, expected = model(make_batch(tokens, [20])), peer(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for entry, down, up, names in pairs:
        # One A of ours stands where each of theirs has its own: its gradient is their sum.
        shared = sum(theirs[f"{name}lora_A.default.weight"].grad for name in names)
        assert (down.grad - shared).norm() < 1e-5 * shared.norm(), entry.ours
        for name, part in zip(names, entry.split(up.grad), strict=True):
            expected = theirs[f"{name}lora_B.default.weight"].grad
            assert (part - expected).norm() < 1e-5 * expected.norm(), name


def test_it_generates_what_its_layers_predict(runtime):
    from step_megatron.generation.engine import Engine
    from step_megatron.generation.request import Prompt, Sampling
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.batch import make_batch

    (model,) = build_model(adapted(small_config()))
    liven(model)
    with torch.no_grad():
        model.language_model.decoder.final_layernorm.weight.fill_(20.0)
    prompt = random_tokens(9)[0].tolist()
    engine, sampling = Engine(model), Sampling(max_new_tokens=12)
    (result,) = engine.generate([Prompt(prompt)], sampling)
    with torch.no_grad():
        logits = model(make_batch(torch.tensor([prompt + result.tokens]), [21]))[0]
        expected = logits[8:20].argmax(-1).tolist()
        with adapters_off(model):
            (base,) = engine.generate([Prompt(prompt)], sampling)
    assert result.tokens == expected != base.tokens


def test_its_operations_are_counted(runtime):
    from torch.utils.flop_counter import FlopCounterMode

    from step_megatron.model.audio_lm import build_model
    from step_megatron.runtime.flops import DecoderShape, lora_work

    config = adapted(small_config(), targets=["linear_qkv", "linear_fc1", "linear_fc2"])
    (model,) = build_model(config)
    batch = audio_batch([9, 20, 5], {1: 23})
    with FlopCounterMode(display=False) as on, torch.no_grad():
        model(batch)
    with FlopCounterMode(display=False) as off, torch.no_grad(), adapters_off(model):
        model(batch)
    work = lora_work(DecoderShape.of(config), config.model.lora, 34)
    assert on.get_total_flops() - off.get_total_flops() == work.forward > 0


def test_freezing_may_leave_some_adapters_but_not_none(runtime):
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.freeze import freeze

    (model,) = build_model(adapted(small_config(), targets=["linear_qkv"]))
    with pytest.raises(ValueError, match="match every adapter that model.lora asks for"):
        freeze([model], ["language_model.*"])
    freeze([model], ["*.layers.0.*", "adaptor.*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"language_model.decoder.layers.1.self_attention.linear_qkv.lora_{part}" for part in "AB"}


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"dropout": 0.1}, "auto", "model.lora.dropout=0.1: dropout is not supported"),
        ({"targets": []}, "auto", "model.lora.targets is empty"),
        ({"alpha": 0.0}, "auto", "out of range"),
        ({}, "te", "model.layers=te has no LoRA"),
    ],
)
def test_settings_that_make_no_adapter_are_refused(settings, layers, message, runtime):
    from step_megatron.model.audio_lm import build_model

    config = adapted(small_config(), **settings)
    config.model.layers = layers
    with pytest.raises((ValueError, RuntimeError), match=message):
        build_model(config)
