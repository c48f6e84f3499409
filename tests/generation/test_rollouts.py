"""Rollouts equal full forward passes under the same seeds, in any batch and layout, and the trainer's log-probabilities."""

import dataclasses

import pytest
import torch
from support.decoder_twins import huggingface_twin, model_of_twin, small_config
from support.rollouts import make_prompts, token_by_token, training_batch

from step_megatron.config.schema import GenerationConfig
from step_megatron.generation import data_parallel
from step_megatron.generation.engine import Engine
from step_megatron.generation.interface import sample_seeds
from step_megatron.generation.request import Sampling

NEW = 10
POLICY = Sampling(temperature=1.0, seed=4, max_new_tokens=NEW)
WARM = Sampling(temperature=1.3, seed=2, max_new_tokens=NEW)
SAMPLINGS = {
    "greedy": Sampling(max_new_tokens=NEW),
    "policy": POLICY,
    "warm": WARM,
    "top-p": dataclasses.replace(WARM, top_p=0.6),
    "top-k": dataclasses.replace(WARM, top_k=5, top_p=0.9),
}


@pytest.fixture
def model(runtime):
    config = small_config()
    return model_of_twin(config, huggingface_twin(config))


@pytest.fixture(scope="module")
def expected():
    """What each sampling has to give, computed once."""
    found = {}

    def of(model, name):
        if name not in found:
            prompts = make_prompts()
            samplings = sample_seeds(SAMPLINGS[name], range(len(prompts)), 1)
            found[name] = [token_by_token(model, *each) for each in zip(prompts, samplings, strict=True)]
        return found[name]

    return of


def same(results, wanted, tolerance=1e-5):
    assert [result.tokens for result in results] == [tokens for tokens, _ in wanted]
    for result, (_, logprobs) in zip(results, wanted, strict=True):
        assert result.logprobs == pytest.approx(logprobs, abs=tolerance)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rollouts_equal_full_forward_passes(model, expected, name):
    same(Engine(model).generate(make_prompts(), SAMPLINGS[name]), expected(model, name))


def rollouts_in_layout(rank, world_size, *, transformer, shared):
    """All samplings, in a layout; `shared`: over data-parallel ranks."""
    from step_megatron.runtime.device import initialize

    config = small_config(**transformer)
    initialize(config)
    if "pipeline_model_parallel_size" in transformer:
        from step_megatron.model.audio_lm import build_model

        try:
            return Engine(build_model(config)[0])
        except ValueError as error:
            return str(error)
    model = model_of_twin(config, huggingface_twin(config)).train()
    engine = Engine(model)
    results = {}
    for name, sampling in SAMPLINGS.items():
        if shared:
            results[name] = data_parallel.generate(engine, make_prompts(), sampling)
        else:
            results[name] = engine.generate(make_prompts(), sampling)
    assert model.training and model.config.sequence_parallel == transformer.get("sequence_parallel", False), "all is restored"
    return results


@pytest.mark.parametrize(
    ("transformer", "shared"),
    [
        ({"tensor_model_parallel_size": 2}, False),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, False),
        ({}, True),
        ({"context_parallel_size": 2}, True),
    ],
    ids=["tp2", "tp2-sp", "dp2", "cp2"],
)
def test_rollouts_of_two_ranks_equal_full_forward_passes(model, expected, worker_pool, transformer, shared):
    ranks = worker_pool(2).run(rollouts_in_layout, {"transformer": transformer, "shared": shared})
    for name in SAMPLINGS:
        for results in ranks:
            same(results[name], expected(model, name))


def test_a_pipelined_model_is_refused_with_the_nearest_layout(worker_pool):
    transformer = {"pipeline_model_parallel_size": 2}
    for message in worker_pool(2).run(rollouts_in_layout, {"transformer": transformer, "shared": False}):
        assert "pipeline_model_parallel_size=1 with tensor_model_parallel_size=2" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollout_and_trainer_agree_on_log_probabilities(runtime, dtype, record_property):
    """Packed sequences through the trainer's own loss: no logits, another attention kernel, other shapes of products."""
    config = small_config(**({"bf16": True} if dtype == "bfloat16" else {}))
    model = model_of_twin(config, huggingface_twin(small_config()))
    prompts = make_prompts()
    results = Engine(model).generate(prompts, POLICY)
    with torch.no_grad():
        losses = model(training_batch(prompts, [result.tokens for result in results], labels=True))[0].double()
    ends = torch.tensor([len(prompt.tokens) + NEW for prompt in prompts]).cumsum(0)
    trainer = torch.stack([-losses[end - NEW - 1 : end - 1] for end in ends])
    worst = float((trainer - torch.tensor([result.logprobs for result in results])).abs().max())
    record_property(f"max_abs_dlogp_{dtype}", worst)
    print(f"max |dlogp| of rollout and trainer in {dtype}: {worst:.1e}")
    assert worst < (1e-5 if dtype == "float32" else 0.2)


def in_compositions(model, **config):
    """The same requests in batches of every kind: all together; two at a time, in small passes; in another order; alone."""
    prompts = make_prompts()
    samplings = sample_seeds(dataclasses.replace(WARM, max_new_tokens=24), range(len(prompts)), 1)
    config |= {"prefill_chunk": 16}
    together = Engine(model, GenerationConfig(**config)).generate(prompts, samplings)
    yield together, Engine(model, GenerationConfig(**config, rows=2, prefill_tokens=16)).generate(prompts, samplings)
    yield together, Engine(model, GenerationConfig(**config)).generate(prompts[::-1], samplings[::-1])[::-1]
    alone = Engine(model, GenerationConfig(**config))
    yield together, [alone.generate([prompt], [each])[0] for prompt, each in zip(prompts, samplings, strict=True)]
    # Ten pages of 16 for samples that each begin with one and grow to three: some have to make way and start again.
    tight = Engine(model, GenerationConfig(**config, cache_tokens=10 * 16))
    yield together, tight.generate(prompts[3:4] * 4 + prompts, samplings[3:4] * 4 + samplings)[4:]
    assert tight.scheduler.preemptions, "the case did not happen"


def test_results_do_not_depend_on_the_batch(model):
    for together, others in in_compositions(model):
        assert [result.tokens for result in others] == [result.tokens for result in together]
        for one, other in zip(others, together, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_invariant_results_have_the_same_bits(model, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for together, others in in_compositions(model, batch_invariant=True):
            assert [(result.tokens, result.logprobs) for result in others] == [(r.tokens, r.logprobs) for r in together]
    finally:
        torch.set_num_threads(before)


def test_samples_of_a_prompt_share_its_pages_and_equal_separate_prompts(model, monkeypatch):
    prompt, samples = make_prompts()[5], 5
    adapted = []
    adapt = type(model.adaptor).forward
    monkeypatch.setattr(type(model.adaptor), "forward", lambda self, *a: adapted.append(1) or adapt(self, *a))
    samplings = sample_seeds(WARM, [0], samples)
    engine = Engine(model)
    group = engine.add(prompt, samplings)
    with engine.running():
        engine.step()
    # 39 tokens are read before the first step: two whole pages are shared; each sample has the third for itself.
    assert len(engine.scheduler.running) == samples and engine.pool.used == 2 + samples
    with engine.running():
        while not engine.scheduler.idle:
            engine.step()
    assert not engine.pool.used and len(adapted) == 1, "the audio is adapted once"
    separate = Engine(model).generate([prompt] * samples, samplings)
    same([member.result for member in group.members], [(result.tokens, result.logprobs) for result in separate], tolerance=1e-6)
    assert len({tuple(result.tokens) for result in separate}) == samples


def test_different_seeds_differ_and_a_penalty_turns_repetition_away(model):
    prompts = make_prompts()
    first, second = (Engine(model).generate(prompts, dataclasses.replace(POLICY, seed=seed)) for seed in (4, 5))
    assert [result.tokens for result in first] != [result.tokens for result in second]
    penalised = Engine(model).generate(prompts, Sampling(repetition_penalty=1e6, max_new_tokens=NEW))
    for prompt, result in zip(prompts, penalised, strict=True):
        assert len(set(result.tokens)) == NEW and not set(result.tokens) & set(prompt.tokens)
