"""Scores, advantages and updates of the trainer equal plain PPO in float64 (`ppo_reference`), in every layout, packed."""

import copy
import dataclasses

import pytest
import torch
from ppo_reference import assess, descend, policy_objective, response_scores, value_objective
from support.decoder_twins import VOCABULARY, huggingface_twin, small_config

from step_megatron.config.rl import PPOConfig, RolloutConfig
from step_megatron.config.schema import DataConfig, RLConfig, TrainingConfig

RATE, CRITIC_RATE, BETA, TEMPERATURE = 0.05, 0.02, 0.3, 1.4
PPO = PPOConfig(gamma=0.97, gae_lambda=0.9, clip=0.05, value_clip=0.1, importance_truncation=None)
# Prompt and response tokens of every sample, and what the response is worth; the reply of one is a single token.
LENGTHS = [(5, 7), (3, 4), (12, 9), (6, 1), (4, 3), (9, 6)]
SCORES = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.0, 0.0], dtype=torch.float64)
MINI_BATCHES = [[0, 2, 4], [1, 3, 5], [5, 1, 0], [2, 3, 4]]


def responses():
    generator = torch.Generator().manual_seed(8)
    drawn = [torch.randint(0, VOCABULARY, (p + r,), generator=generator).tolist() for p, r in LENGTHS]
    return [(ids[:p], ids[p:]) for ids, (p, _) in zip(drawn, LENGTHS, strict=True)]


def head_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(1, width, generator=generator) * 0.3, torch.full((1,), 0.1)


def configured(transformer, rate):
    config = small_config(**transformer)
    optimizer = {"optimizer": "sgd", "lr": rate, "min_lr": rate, "sgd_momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.0}
    rl = RLConfig(rollout=RolloutConfig(temperature=TEMPERATURE), ppo=PPO)
    return dataclasses.replace(
        config,
        data=DataConfig(tokens_per_micro_batch=32),
        training=TrainingConfig(steps=10, lr_schedule="constant"),
        megatron=dataclasses.replace(config.megatron, optimizer=optimizer),
        rl=rl,
    )


def built(config, head, seed):
    """A training state with a twin's weights, and a value head that is not zero."""
    from step_megatron.checkpoint.distributed import unwrap
    from step_megatron.model.huggingface import from_huggingface
    from step_megatron.model.weights import load
    from step_megatron.runtime import device
    from step_megatron.training.state import build_state

    state = build_state(config, device.current().control_group, head=head)
    full = from_huggingface(huggingface_twin(config, seed).state_dict(), state.transformer, config.model.tie_embeddings)
    load([unwrap(chunk).language_model for chunk in state.model], full)
    for chunk in map(unwrap, state.model):
        if getattr(chunk, "value_head", None) is not None:
            weight, bias = head_of(state.transformer.hidden_size)
            chunk.value_head.weight.data.copy_(weight)
            chunk.value_head.bias.data.copy_(bias)
    # An optimizer with a copy of its own takes it from the model.
    state.optimizer.reload_model_params()
    return state


def trained(rank, world_size, *, transformer):
    """What the trainer says of the responses, and the parameters after four optimizer steps."""
    import numpy as np
    import torch.distributed as dist
    from parallel.layouts import full_tensors

    from step_megatron.data.clip_lengths import ClipLengths
    from step_megatron.data.template import TokenizedSample
    from step_megatron.rl.assessment import assess as assess_packed
    from step_megatron.rl.batching import ResponseBatcher
    from step_megatron.rl.learning import Learner, actor_loss, critic_loss, score
    from step_megatron.rl.rollout import Experience
    from step_megatron.runtime.device import initialize

    config = configured(transformer, RATE)
    runtime = initialize(config)
    group = dist.group.WORLD
    actor = Learner(built(config, "language", 0), runtime, group)
    critic = Learner(built(configured(transformer, CRITIC_RATE), "value", 1), runtime, group)
    reference = built(config, "language", 2).model
    samples = [
        TokenizedSample(str(i), "s", np.array(p + r), np.array([0] * len(p) + [1] * len(r), np.uint8), ())
        for i, (p, r) in enumerate(responses())
    ]
    lengths = [len(response) for _, response in responses()]
    experience = Experience(
        samples,
        torch.arange(len(samples)),
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        torch.zeros(sum(lengths)),
        valid=torch.ones(len(samples), dtype=torch.bool),
    )
    batcher = ResponseBatcher(config, 0, ClipLengths(None, config.adaptor), runtime)

    def scored(model, with_entropy=False):
        batches = batcher.batches(experience, range(len(samples)), {}, with_entropy)
        return score(model, batches, experience.tokens, runtime, group)

    said = scored(actor.model, with_entropy=True)
    experience.old, entropy = said["log_probs"], said["entropy"]
    experience.reference = scored(reference)["log_probs"]
    experience.values = scored(critic.model)["values"]
    assess_packed(experience, SCORES, PPO, BETA)
    for chosen in MINI_BATCHES:
        batches = batcher.batches(experience, chosen, {})
        actor.step(batches, actor_loss(experience, PPO, BETA, None))
        critic.step(batches, critic_loss(experience, PPO))
    return {
        "old": experience.old, "entropy": entropy, "reference": experience.reference, "values": experience.values,
        "advantages": experience.advantages, "returns": experience.returns,
        "actor": full_tensors(actor.model, lambda p: p), "critic": full_tensors(critic.model, lambda p: p),
    }  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    """The same by `ppo_reference`."""
    config = small_config()
    policy, critic, reference = (huggingface_twin(config, seed).double() for seed in (0, 1, 2))
    head = [part.double().requires_grad_() for part in head_of(config.megatron.transformer["hidden_size"])]
    pairs = responses()

    def policy_says(model, which):
        return [response_scores(model, None, *pairs[i], TEMPERATURE) for i in which]

    def critic_says(which):
        return [response_scores(critic, head, *pairs[i], TEMPERATURE) for i in which]

    everything = range(len(pairs))
    with torch.no_grad():
        old, entropy = zip(*policy_says(policy, everything), strict=True)
        of_reference, values = [s[0] for s in policy_says(reference, everything)], critic_says(everything)
    lists = [[each.tolist() for each in part] for part in (old, of_reference, values)]
    advantages, returns = assess(*lists, SCORES.tolist(), BETA, PPO.gamma, PPO.gae_lambda)
    # Nothing learns from the critic's output layer.
    learnt = [p for name, p in critic.named_parameters() if not name.startswith("lm_head")] + head
    for chosen in MINI_BATCHES:
        new = [s[0] for s in policy_says(policy, chosen)]
        loss = policy_objective(new, [old[i] for i in chosen], [advantages[i] for i in chosen], PPO.clip)
        descend(list(policy.parameters()), loss, RATE)
        loss = value_objective(critic_says(chosen), [values[i] for i in chosen], [returns[i] for i in chosen], PPO.value_clip)
        descend(learnt, loss, CRITIC_RATE)

    def flat(parts):
        return torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in parts])

    return {
        "old": flat(old), "entropy": flat(entropy), "reference": flat(of_reference), "values": flat(values),
        "advantages": flat(advantages), "returns": flat(returns),
        "actor": policy.state_dict(), "critic": critic.state_dict() | {"head.weight": head[0], "head.bias": head[1]},
    }  # fmt: skip


LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ppo_step_equals_plain_ppo_in_float64(layout, expected, worker_pool):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from step_megatron.model.huggingface import to_huggingface

    processes, transformer = LAYOUTS[layout]
    config = copy.deepcopy(small_config())
    sizes = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=160)
    for result in worker_pool(processes).run(trained, {"transformer": transformer}):
        for name in ("old", "entropy", "reference", "values", "advantages", "returns"):
            assert result[name].double() == pytest.approx(expected[name], rel=1e-5, abs=2e-5), name
        for model in ("actor", "critic"):
            full = {name.removeprefix("language_model."): value for name, value in result[model].items()}
            if model == "critic":
                assert full["value_head.weight"].double() == pytest.approx(expected[model]["head.weight"].detach(), abs=2e-6)
                assert full["value_head.bias"].double() == pytest.approx(expected[model]["head.bias"].detach(), abs=2e-6)
                full["output_layer.weight"] = torch.zeros(VOCABULARY, 64)
            decoder = {name: value for name, value in full.items() if not name.startswith(("adaptor", "value_head"))}
            for name, value in to_huggingface(decoder, sizes, config.model.tie_embeddings).items():
                if not (model == "critic" and name == "lm_head.weight"):
                    assert value.double() == pytest.approx(expected[model][name], abs=2e-6), (model, name)
