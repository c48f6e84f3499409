"""The vLLM backend on a stand-in with vLLM's interface: our engine's samples, weights that follow, a gate that shuts."""

import sys
from dataclasses import replace

import pytest
import torch
from support import fake_vllm
from support.decoder_twins import huggingface_twin, model_of_twin, small_config
from support.rollouts import make_prompts

from step_megatron.config.load import ConfigError
from step_megatron.generation.backend import rollout_engine
from step_megatron.generation.engine import Engine
from step_megatron.generation.parity import ParityError, trainer_log_probs
from step_megatron.generation.request import ReasoningBudget, Sampling
from step_megatron.generation.vllm_backend import VLLMEngine

POLICY = Sampling(temperature=1.3, seed=2, max_new_tokens=6)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    config = small_config()
    config.rl.rollout.backend = "vllm"
    config.rl.rollout.vllm.parity_limit = 1e-4
    return config


@pytest.fixture
def model(runtime, config):
    return model_of_twin(config, huggingface_twin(config)).train()


def dlogp(model, prompts, generations, temperature=POLICY.temperature) -> float:
    wanted = trainer_log_probs(model, prompts, [each.tokens for each in generations], temperature)
    return max(float((torch.tensor(each.logprobs) - mine).abs().max()) for each, mine in zip(generations, wanted, strict=True))


def test_greedy_samples_are_our_engines(model, config):
    prompts, sampling = make_prompts(), Sampling(max_new_tokens=6, stop_ids=(3, 5))
    ours = Engine(model, config.generation).generate(prompts, sampling)
    engine = VLLMEngine(model, config)
    theirs = engine.generate(prompts, sampling)
    assert [(each.tokens, each.finish_reason) for each in theirs] == [(each.tokens, each.finish_reason) for each in ours]
    assert {each.finish_reason for each in theirs} == {"stop", "length"}
    for mine, other in zip(ours, theirs, strict=True):
        assert other.logprobs == pytest.approx(mine.logprobs, abs=1e-5)
    assert model.training and engine.parity is None, "without a policy there is no gate"


def test_samples_follow_the_weights_and_carry_their_version(model, config):
    prompts = make_prompts()
    engine = rollout_engine(model, config)
    assert isinstance(engine, VLLMEngine)
    ended = []
    first = engine.generate(prompts, POLICY, samples=2, progress=ended.append)
    assert sum(ended) == len(first) == 2 * len(prompts) and {each.weight_version for each in first} == {0}
    assert len({tuple(each.tokens) for each in first}) > len(prompts), "every sample has a seed of its own"
    assert 0 <= engine.parity < 1e-5 and dlogp(model, [p for p in prompts for _ in range(2)], first) < 1e-5
    engine.release_cache()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.weights_changed()
    second = engine.generate(prompts, POLICY)
    assert {each.weight_version for each in second} == {1} and dlogp(model, prompts, second) < 1e-5
    assert engine._engine.calls == ["sleep 2", "wake ['weights']", "reload_weights", "wake ['kv_cache']", "reset_prefix_cache"]
    assert engine._engine.args.gpu_memory_utilization == config.rl.rollout.vllm.memory_share


@pytest.mark.parametrize(
    "fault", [lambda logits: 1.01 * logits, lambda logits: logits.roll(1), lambda logits: logits * torch.nan], ids=str
)
def test_an_engine_that_computes_something_else_trains_nothing(model, config, monkeypatch, fault):
    monkeypatch.setattr(fake_vllm.LLMEngine, "fault", staticmethod(lambda logits: fault(logits).nan_to_num(0.0)))
    with pytest.raises(ParityError, match="it does not generate what is trained.*parity_limit"):
        rollout_engine(model, config).generate(make_prompts(), POLICY)


def test_log_probabilities_of_another_temperature_do_not_pass(model, config, monkeypatch):
    arguments = VLLMEngine._arguments
    monkeypatch.setattr(VLLMEngine, "_arguments", lambda self: arguments(self) | {"logprobs_mode": "raw_logprobs"})
    with pytest.raises(ParityError):
        rollout_engine(model, config).generate(make_prompts(), POLICY)


def test_what_it_cannot_do_is_refused(model, config, monkeypatch):
    engine, prompt = rollout_engine(model, config), make_prompts()[0]
    budget = ReasoningBudget(2, (1,), ((1,),))
    for sampling, message in (
        (replace(POLICY, top_p=0.9), "not of the policy"),
        (replace(POLICY, top_k=4), "not of the policy"),
        (replace(POLICY, repetition_penalty=1.1), "not of the policy"),
        (replace(POLICY, budget=budget), "no reasoning budget"),
        (replace(POLICY, max_new_tokens=1000), "can outgrow"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, [sampling], "prompt 7")
    group = engine.add(prompt, [POLICY, POLICY])
    with pytest.raises(RuntimeError, match="while samples were being generated"):
        engine.weights_changed()
    with engine.running():
        engine.step()
        waiting = engine.add(prompt, [POLICY])
        for each in (group, waiting):
            engine.cancel(each)
    assert engine.idle and not engine._engine.has_unfinished_requests()
    assert {member.result.finish_reason for member in group.members + waiting.members} == {"cancelled"}
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'step-megatron\[vllm\]'"):
        VLLMEngine(model, config)


def rollouts_in_layout(rank, world_size, *, parallel):
    """Two ranks of one model, or two replicas."""
    from step_megatron.runtime.device import initialize

    sys.modules["vllm"] = fake_vllm
    try:
        config = small_config(tensor_model_parallel_size=parallel, sequence_parallel=parallel > 1)
        config.rl.rollout.backend = "vllm"
        config.rl.rollout.vllm.parity_limit = 1e-4
        initialize(config)
        model = model_of_twin(config, huggingface_twin(config)).train()
        engine = rollout_engine(model, config)
        return [each.tokens for each in engine.generate(make_prompts(), POLICY)], engine.parity
    finally:
        del sys.modules["vllm"]


def test_ranks_of_a_model_and_replicas_generate_the_same(worker_pool, model, config):
    expected = [each.tokens for each in rollout_engine(model, config).generate(make_prompts(), POLICY)]
    for parallel in (2, 1):
        for tokens, parity in worker_pool(2).run(rollouts_in_layout, {"parallel": parallel}):
            assert tokens == expected and parity < 1e-5
