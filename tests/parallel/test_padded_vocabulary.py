"""A vocabulary that tensor parallelism cannot cut evenly is padded, and that changes no loss, no gradient and no token."""

from unittest import mock

import pytest
import torch
from parallel.layouts import load_and_train, train, train_and_save
from step_kernels.linear_cross_entropy import _BUFFER_BYTES, chunk_rows
from support.decoder_twins import huggingface_twin, model_of_twin, random_tokens, small_config

TP2 = {"tensor_model_parallel_size": 2}
# The synthetic tokens are below 128.
VOCABULARY = 131
ROWS = ("word_embeddings.weight", "output_layer.weight")


def unpadded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the padding, which has to be zero."""
    for name, tensor in tensors.items():
        assert not name.endswith(ROWS) or not tensor[VOCABULARY:].any(), name
    return {name: tensor[:VOCABULARY] if name.endswith(ROWS) else tensor for name, tensor in tensors.items()}


def check(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    actual = unpadded(actual)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_gradients_are_those_of_one_process(tied, worker_pool):
    kwargs = {"optimizer": "sgd", "tied": tied, "vocabulary": VOCABULARY}
    expected = worker_pool(1).run(train, kwargs | {"transformer": {}})[0]
    actual = worker_pool(2).run(train, kwargs | {"transformer": TP2 | {"sequence_parallel": True}})[0]
    for line, reference in zip(actual["lines"], expected["lines"], strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    check(actual["gradients"], expected["gradients"], 1e-6)
    check(actual["parameters"], expected["parameters"], 1e-6)


@pytest.mark.parametrize("layouts", [(TP2, {}), ({}, TP2)])
def test_checkpoints_move_between_paddings(layouts, worker_pool, tmp_path):
    before, after = layouts
    kwargs = {"optimizer": "adam", "run_dir": str(tmp_path), "vocabulary": VOCABULARY}
    written = worker_pool(2 if before else 1).run(train_and_save, kwargs | {"transformer": before, "steps": 2})[0]
    resumed = worker_pool(2 if after else 1).run(load_and_train, kwargs | {"transformer": after})[0]
    check(resumed["saved"] if after else written["saved"], unpadded(written["saved"] if after else resumed["saved"]), 0)
    check(resumed["after"] if after else written["after"], unpadded(written["after"] if after else resumed["after"]), 5e-5)


def train_by_chunks(rank, world_size, **kwargs) -> dict:
    """With a buffer for 32 tokens' logits where a rank has 66 rows, for 64 where it has 65: the last one's without padding."""
    step = (((80, (23,), 45), (48, (), 40)),) * 4  # trained tokens of several chunks
    with mock.patch.dict(_BUFFER_BYTES, cpu=64 * 4 * 65), mock.patch("parallel.synthetic.STEP", step):
        assert [chunk_rows(85, rows, 4, "cpu") for rows in (66, 65)] == [32, 64]
        return train(rank, world_size, **kwargs)


def test_ranks_cut_the_tokens_into_the_same_chunks(worker_pool):
    kwargs = {"optimizer": "sgd", "vocabulary": VOCABULARY}
    expected = worker_pool(1).run(train_by_chunks, kwargs | {"transformer": {}})[0]
    actual = worker_pool(2).run(train_by_chunks, kwargs | {"transformer": TP2})[0]
    assert [line["loss"] for line in actual["lines"]] == pytest.approx([line["loss"] for line in expected["lines"]], rel=1e-6)
    check(actual["gradients"], expected["gradients"], 1e-6)


def greedy(rank: int, world_size: int, *, transformer: dict) -> tuple[list[int], torch.Tensor]:
    """Sixteen tokens and their log-probabilities; logits are near 0, so padding would take its share if it were a token."""
    from step_megatron.generation.engine import Engine
    from step_megatron.generation.request import Prompt, Sampling
    from step_megatron.runtime.device import initialize

    config = small_config(**transformer)
    config.model.vocabulary_size = VOCABULARY
    initialize(config)
    model = model_of_twin(config, huggingface_twin(config))
    with torch.no_grad():
        model.language_model.decoder.final_layernorm.weight.fill_(0.01)
    (result,) = Engine(model).generate([Prompt(random_tokens(9)[0].tolist())], Sampling(max_new_tokens=16))
    return result.tokens, torch.tensor(result.logprobs)


def test_generation_never_draws_padding(worker_pool):
    (expected, probabilities), *_ = worker_pool(1).run(greedy, {"transformer": {}})
    (actual, others), *_ = worker_pool(2).run(greedy, {"transformer": TP2})
    assert actual == expected and max(actual) < VOCABULARY
    torch.testing.assert_close(others, probabilities, rtol=1e-5, atol=1e-6)
