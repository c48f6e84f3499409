"""Generation equals transformers' greedy search, whatever the batch; sampling, stopping and budgets do what they say."""

import dataclasses

import pytest
import torch
from step_kernels import registry
from support.decoder_twins import ENCODER_WIDTH, audio_batch, huggingface_twin, model_of_twin, small_config
from support.rollouts import make_prompts

from step_megatron.config.schema import GenerationConfig
from step_megatron.generation.engine import Engine
from step_megatron.generation.layers import can_run
from step_megatron.generation.request import Prompt, ReasoningBudget, Sampling

NEW = 12


def twin_greedy(twin, model, prompt: Prompt, new: int) -> list[int]:
    """Hugging Face's greedy search on the prompt's embeddings, alone in its batch."""
    embeddings = twin.get_input_embeddings()(torch.tensor([prompt.tokens])).clone()
    if prompt.encoder_frames:
        embeddings[0, list(prompt.audio_positions)] = model.adaptor(prompt.audio_features, prompt.encoder_frames)
    with torch.no_grad():
        out = twin.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0].tolist()


def generate(model, prompts, max_new_tokens=NEW, config=None, progress=None, **sampling):
    return Engine(model, config).generate(prompts, Sampling(max_new_tokens=max_new_tokens, **sampling), progress=progress)


@pytest.fixture
def pair(runtime):
    config = small_config()
    twin = huggingface_twin(config)
    return model_of_twin(config, twin), twin


def test_prompts_and_decoding_run_on_the_kernels(pair):
    registry.chosen.clear()
    generate(pair[0], make_prompts(), 2)
    used = ("rope_to_cache", "paged_attention", "rms_norm", "swiglu", "conv_downsample_gelu", "skinny_linear", "draw_tokens")
    assert set(registry.chosen) >= {(op, "cpp") for op in used}
    assert not [op for op, backend in registry.chosen if backend == "torch"], "a reference in a kernel's place"


@pytest.mark.parametrize("lean", [True, False], ids=["lean-layers", "megatron-layers"])
def test_greedy_equals_transformers_on_ragged_prompts_with_audio(pair, lean, monkeypatch):
    model, twin = pair
    assert can_run(model.language_model)
    if not lean:
        monkeypatch.setattr("step_megatron.generation.forward.can_run", lambda language_model: False)
    prompts = make_prompts()
    model.train()
    expected = [twin_greedy(twin, model, prompt, NEW) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "prompts that all go on alike prove little"
    # All at once; three at a time; prompts read in several chunks and passes.
    for settings in ({}, {"rows": 3}, {"prefill_chunk": 7, "prefill_tokens": 16}):
        results = generate(model, prompts, config=GenerationConfig(**settings))
        assert [result.tokens for result in results] == expected
        assert all(result.finish_reason == "length" for result in results)
    assert model.training, "the mode is restored"
    batch = audio_batch([14, 6], {0: 9})
    predicted = torch.tensor([3, 17])
    model(dataclasses.replace(batch, labels=batch.labels[:, predicted], predicted=predicted)).sum().backward()
    assert model.adaptor.linear2.weight.grad.any(), "the model trains on after it has generated"
    assert [result.tokens for result in generate(model, prompts, NEW)] == expected, "a training step leaves nothing behind"


@pytest.mark.parametrize("tied, qkv_bias", [(True, True), (False, False)], ids=["tied", "llama"])
def test_other_decoders_generate_too(runtime, tied, qkv_bias):
    config = small_config(tied, qkv_bias)
    twin = huggingface_twin(config)
    model = model_of_twin(config, twin)
    prompts = make_prompts()[:3]
    assert [g.tokens for g in generate(model, prompts, NEW)] == [twin_greedy(twin, model, p, NEW) for p in prompts]


def test_rows_stop_and_leave_without_changing_the_others(pair):
    model, _ = pair
    prompts = make_prompts()
    free = [result.tokens for result in generate(model, prompts, NEW)]
    # Stop ids that end some rows early and one row nowhere.
    stops = {free[0][2], free[1][5], free[3][0]}
    finished = []
    results = generate(model, prompts, NEW, stop_ids=tuple(stops), progress=finished.append)
    for result, tokens in zip(results, free, strict=True):
        end = next((i + 1 for i, token in enumerate(tokens) if token in stops), NEW)
        assert result.tokens == tokens[:end] and len(result.logprobs) == end
        assert result.finish_reason == ("stop" if tokens[end - 1] in stops else "length")
    assert sum(finished) == len(prompts)
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_a_row_cannot_stop_before_the_minimum(pair):
    model, _ = pair
    prompts = make_prompts()
    free = [result.tokens for result in generate(model, prompts, NEW)]
    results = generate(model, prompts, NEW, stop_ids=tuple({tokens[0] for tokens in free}), min_new_tokens=4)
    assert min(len(result.tokens) for result in results) >= 4


def test_a_reasoning_budget_closes_open_reasoning_only(pair):
    model, _ = pair
    prompts = make_prompts()
    free = [result.tokens for result in generate(model, prompts, NEW)]
    ending = tuple(free[0][1:3])
    budget = ReasoningBudget(tokens=5, closing=(7, 8, 9), endings=(ending, (7, 8, 9)))
    results = generate(model, prompts, NEW, stop_ids=(8,), budget=budget)
    assert results[0].tokens[:NEW] == free[0][:NEW] and results[0].forced == 0
    closed = [result for result in results if result.forced]
    assert closed, "no row was closed"
    for result in closed:
        assert result.forced == 3 and result.tokens[5:8] == [7, 8, 9], "a forced stop id does not stop"


@pytest.mark.parametrize(
    "prompt, arguments, message",
    [
        (Prompt([]), {}, "prompt 0 is empty"),
        (Prompt([1] * 250), {}, "outgrow model.max_positions=256"),
        (Prompt([1] * 9, [1, 2], torch.zeros(6, ENCODER_WIDTH), (6,)), {}, "2 placeholders for 3 audio tokens"),
        (Prompt([1]), {"temperature": -1.0}, "temperature=-1.0"),
        (Prompt([1]), {"top_p": 0.0}, "top_p=0.0"),
        (Prompt([1]), {"top_k": -1}, "top_k=-1"),
        (Prompt([1]), {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        (Prompt([1]), {"max_new_tokens": 0}, "max_new_tokens=0"),
        (Prompt([1]), {"stop_ids": tuple(range(17))}, "at most 16"),
        (Prompt([1] * 4, [3], torch.zeros(2, ENCODER_WIDTH), (2,)), {}, "ends in audio"),
    ],
)
def test_bad_arguments_are_named(pair, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[0], [prompt], **arguments)


def test_what_the_trainer_does_not_compute_is_refused_for_a_policy(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="repetition_penalty is refused"):
        Engine(model, for_policy=True).generate(make_prompts()[:1], Sampling(repetition_penalty=1.1, max_new_tokens=4))


def test_a_prompt_that_the_cache_cannot_hold_is_refused_with_the_setting(pair):
    model, _ = pair
    with pytest.raises(ValueError, match="generation.cache_tokens"):
        generate(model, [Prompt([1] * 30)], config=GenerationConfig(cache_tokens=32))


def test_samples_carry_the_version_of_the_weights_and_the_cache_can_go(pair):
    model, _ = pair
    engine = Engine(model)
    sampling = Sampling(max_new_tokens=3)
    (first,) = engine.generate(make_prompts()[:1], sampling)
    assert engine.cache_bytes > 0
    engine.release_cache()
    assert engine.cache_bytes == 0
    with torch.no_grad():
        model.language_model.output_layer.weight.neg_()
    engine.weights_changed()
    (second,) = engine.generate(make_prompts()[:1], sampling)
    assert (first.weight_version, second.weight_version) == (0, 1)
    assert first.tokens != second.tokens, "the weights are the trainer's own"
    group = engine.add(make_prompts()[1], [sampling])
    with engine.running():
        engine.step()
    for refused in (engine.weights_changed, engine.release_cache):
        with pytest.raises(RuntimeError):
            refused()
    engine.cancel(group)
    assert group.members[0].result.finish_reason == "cancelled" and engine.scheduler.idle and not engine.pool.used
