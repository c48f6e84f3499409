"""Gradients: of the token mean over very unequal micro-batches, and of the adaptor alone under a frozen, recomputed decoder."""

import dataclasses

import pytest
import torch
from parallel.layouts import small_config, train
from parallel.synthetic import ENCODER_WIDTH, GROUPS, pack, step_segments

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def hand_loop(rank, world_size):
    """Gradients of the mean over all tokens, and of the mean of the micro-batches' means, by plain autograd; and the losses."""
    from parallel.layouts import OPTIMIZERS, full_tensors, lively_state

    from step_megatron.checkpoint.distributed import unwrap
    from step_megatron.runtime.device import initialize
    from step_megatron.training.batch import to_device

    config = small_config({"calculate_per_token_loss": False}, OPTIMIZERS["sgd"])
    runtime = initialize(config)
    state = lively_state(config)
    model = unwrap(state.model[0])
    groups, clips = step_segments(0)
    batches = [to_device(pack(group), clips, GROUPS, ENCODER_WIDTH, runtime) for group in groups]
    results = []
    for token_mean in (True, False):
        sums, counts = [], []
        for group, batch in zip(groups, batches, strict=True):
            logits = model(dataclasses.replace(batch.model, labels=None, predicted=None))[0]
            trained = pack(group).loss_mask[0] == 1
            labels = pack(group).labels[0][trained]
            sums.append(torch.nn.functional.cross_entropy(logits[trained], labels, reduction="sum"))
            counts.append(len(labels))
        means = [s / c for s, c in zip(sums, counts, strict=True)]
        loss = sum(sums) / sum(counts) if token_mean else sum(means) / len(means)
        parameters = list(model.parameters())
        gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters), strict=True))
        results.append((loss.item(), full_tensors(state.model, gradients.__getitem__)))
    return results


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.mark.parametrize(("processes", "transformer"), [(1, {}), (2, {}), (2, PP2)])
def test_the_loss_is_the_mean_over_tokens_and_not_of_means(processes, transformer, worker_pool):
    (token_mean, gradients), (mean_of_means, wrong) = worker_pool(1).run(hand_loop)[0]
    trained = worker_pool(processes).run(train, {"transformer": transformer, "optimizer": "sgd"})[0]
    assert trained["lines"][0]["loss"] == pytest.approx(token_mean, rel=1e-6)
    assert distance(trained["gradients"], gradients) < 1e-6
    assert abs(mean_of_means - token_mean) > 1e-3 and distance(wrong, gradients) > 1e-1, "the test could not tell them apart"


@pytest.mark.parametrize(("processes", "transformer"), [(1, {}), (2, TP2), (2, PP2)])
def test_a_frozen_recomputed_decoder_gives_the_adaptor_the_same_gradients(processes, transformer, worker_pool):
    kwargs = {"optimizer": "adam", "freeze": ("language_model.*",)}
    plain = worker_pool(1).run(train, kwargs | {"transformer": {}})[0]
    recomputed = worker_pool(processes).run(train, kwargs | {"transformer": transformer | RECOMPUTE})[0]
    assert all(name.startswith("adaptor.") for name in plain["gradients"])
    assert all(gradient.norm() > 1e-3 for gradient in recomputed["gradients"].values())
    assert distance(recomputed["gradients"], plain["gradients"]) < 1e-6
    assert distance(recomputed["parameters"], plain["parameters"]) < 5e-5


@pytest.mark.parametrize(("processes", "transformer"), [(1, {}), (2, PP2)])
def test_a_frozen_embedding_does_not_hide_the_decoder_from_recomputation(processes, transformer, worker_pool):
    kwargs = {"optimizer": "adam", "freeze": ("adaptor.*", "*word_embeddings*")}
    plain = worker_pool(1).run(train, kwargs | {"transformer": {}})[0]
    recomputed = worker_pool(processes).run(train, kwargs | {"transformer": transformer | RECOMPUTE})[0]
    assert distance(recomputed["gradients"], plain["gradients"]) < 1e-6
