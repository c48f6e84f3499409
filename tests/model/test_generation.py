"""Generation equals transformers' greedy search, whatever the batch; sampling, stopping and budgets do what they say."""

import dataclasses

import pytest
import torch
from step_kernels import registry
from support.decoder_twins import ENCODER_WIDTH, VOCABULARY, audio_batch, huggingface_twin, model_of_twin, small_config

from step_megatron.model.decode_step import can_step
from step_megatron.model.generation import Prompt, ReasoningBudget, generate

NEW = 12
# Prompt lengths and, for some, the encoder frames of their audio chunks.
PROMPTS = [(5, ()), (30, (17, 8)), (9, ()), (12, (6,)), (5, ()), (40, (24,)), (1, ())]


def make_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(11)
    prompts = []
    for length, frames in PROMPTS:
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        features = torch.randn(sum(frames), ENCODER_WIDTH, generator=generator) if frames else None
        audio, start = [], 1
        for count in frames:
            audio += range(start, start + (count + 1) // 2)
            start = audio[-1] + 2
        prompts.append(Prompt(tokens, audio, features, frames))
    return prompts


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


@pytest.fixture
def pair(runtime):
    config = small_config()
    twin = huggingface_twin(config)
    return model_of_twin(config, twin), twin


def test_prompts_and_decoding_run_on_the_kernels(pair):
    registry.chosen.clear()
    generate(pair[0], make_prompts(), 2)
    assert set(registry.chosen) >= {(op, "cpp") for op in ("causal_attention_varlen", "paged_attention", "conv_downsample_gelu")}
    assert not [op for op, backend in registry.chosen if backend == "torch"], "a reference in a kernel's place"


@pytest.mark.parametrize("lean", [True, False], ids=["lean-step", "megatron-layers"])
def test_greedy_equals_transformers_on_ragged_prompts_with_audio(pair, lean, monkeypatch):
    model, twin = pair
    assert can_step(model.language_model)
    if not lean:
        monkeypatch.setattr("step_megatron.model.generation.can_step", lambda language_model: False)
    prompts = make_prompts()
    model.train()
    expected = [twin_greedy(twin, model, prompt, NEW) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "prompts that all go on alike prove little"
    # One batch; batches of three; prefill in several passes.
    for arguments in ({}, {"batch_size": 3}, {"prefill_tokens": 16}):
        results = generate(model, prompts, NEW, **arguments)
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
    results = generate(model, prompts, NEW, stop_ids=list(stops), progress=finished.append)
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
    results = generate(model, prompts, NEW, stop_ids=sorted({tokens[0] for tokens in free}), min_new_tokens=4)
    assert min(len(result.tokens) for result in results) >= 4


def test_logprobs_are_the_models(pair):
    model, twin = pair
    prompt = make_prompts()[2]
    (result,) = generate(model, [prompt], NEW, temperature=1.3, top_p=0.9, seed=2)
    whole = torch.tensor([[*prompt.tokens, *result.tokens]])
    with torch.no_grad():
        logprobs = twin(whole).logits.double().log_softmax(-1)[0, len(prompt.tokens) - 1 : -1]
    expected = logprobs.gather(-1, torch.tensor(result.tokens)[:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor(result.logprobs).double(), expected, rtol=0, atol=1e-4)


def test_sampling_does_not_depend_on_the_batch(pair):
    model, _ = pair
    prompts = make_prompts()
    sampled = {size: generate(model, prompts, NEW, temperature=1.0, seed=4, batch_size=size) for size in (2, 64)}
    assert [r.tokens for r in sampled[2]] == [r.tokens for r in sampled[64]]
    assert [r.tokens for r in sampled[64]] != [r.tokens for r in generate(model, prompts, NEW, temperature=1.0, seed=5)]


def test_samples_follow_the_nucleus_of_the_distribution():
    from step_megatron.model.sampling import Sampler, Sampling

    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    rows, draws = list(range(200)), 50
    logits = probabilities.log().expand(len(rows), -1) * 0.7
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.8), rows)
    counts = torch.bincount(torch.cat([sampler(logits, rows) for _ in range(draws)]), minlength=5).double()
    # 0.4 + 0.25 < 0.8, so the nucleus is the first three: 0.4, 0.25, 0.2.
    expected = torch.tensor([0, 0.4, 0, 0.25, 0.2]).double() / 0.85
    torch.testing.assert_close(counts / counts.sum(), expected, rtol=0, atol=0.02)
    assert not counts[[0, 2]].any()


def test_a_reasoning_budget_closes_open_reasoning_only(pair):
    model, _ = pair
    prompts = make_prompts()
    free = [result.tokens for result in generate(model, prompts, NEW)]
    ending = tuple(free[0][1:3])
    budget = ReasoningBudget(tokens=5, closing=(7, 8, 9), endings=(ending, (7, 8, 9)))
    results = generate(model, prompts, NEW, stop_ids=[8], budget=budget)
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
        (Prompt([1]), {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_arguments_are_named(pair, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pair[0], [prompt], **({"max_new_tokens": NEW} | arguments))


def generate_in_layout(rank, world_size, transformer):
    """Logits of a packed audio batch and greedy tokens in one layout, from the twin's weights."""
    from step_megatron.runtime.device import initialize

    config = small_config(**transformer)
    initialize(config)
    if "pipeline_model_parallel_size" in transformer:
        from step_megatron.model.audio_lm import build_model

        try:
            return generate(build_model(config)[0], make_prompts(), NEW)
        except ValueError as error:
            return str(error)
    model = model_of_twin(config, huggingface_twin(config))
    batch = audio_batch([14, 6, 20], {0: 9, 2: 24})
    batch.labels = None
    with torch.no_grad():
        logits = model(batch)
    tokens = [result.tokens for result in generate(model, make_prompts(), NEW)]
    assert model.config.sequence_parallel == transformer.get("sequence_parallel", False), "sequence parallelism is restored"
    return logits, tokens


def test_tensor_parallel_logits_and_tokens_equal_one_process(pair, worker_pool):
    model, _ = pair
    batch = audio_batch([14, 6, 20], {0: 9, 2: 24})
    batch.labels = None
    with torch.no_grad():
        expected = model(batch)
    tokens = [result.tokens for result in generate(model, make_prompts(), NEW)]
    for split in (False, True):
        transformer = {"tensor_model_parallel_size": 2, "sequence_parallel": split}
        results = worker_pool(2).run(generate_in_layout, {"transformer": transformer})
        torch.testing.assert_close(torch.cat([logits for logits, _ in results], -1), expected, rtol=0, atol=1e-5)
        assert all(result == tokens for _, result in results)


def test_a_pipelined_model_is_refused_with_the_remedy(worker_pool):
    messages = worker_pool(2).run(generate_in_layout, {"transformer": {"pipeline_model_parallel_size": 2}})
    assert all("pipeline_model_parallel_size=1" in message for message in messages)
