"""merge_audio_embeddings puts every row at its place, with gradients; the kernels stand without Megatron."""

import subprocess
import sys

import pytest
import torch
from step_kernels import merge_audio_embeddings
from step_kernels.merge_audio import merge_audio_embeddings_reference


@pytest.mark.parametrize("trailing", [(4,), (1, 4)])
@pytest.mark.parametrize("positions", [[], [0], [5, 1, 2], list(range(6))])
def test_merge_and_its_gradients_equal_the_reference(trailing, positions):
    index = torch.tensor(positions, dtype=torch.int64)
    values = [torch.randn(count, *trailing, dtype=torch.float64) for count in (6, len(positions))]
    ours, theirs = ([x.clone().requires_grad_() for x in values] for _ in range(2))
    actual, expected = merge_audio_embeddings(*ours, index), merge_audio_embeddings_reference(*theirs, index)
    assert torch.equal(actual, expected)
    cotangent = torch.randn(actual.shape, dtype=torch.float64)
    actual.backward(cotangent)
    expected.backward(cotangent)
    assert torch.equal(ours[0].grad, theirs[0].grad if theirs[0].grad is not None else torch.zeros_like(ours[0]))
    assert torch.equal(ours[1].grad, theirs[1].grad if positions else torch.zeros_like(ours[1]))


def test_without_audio_the_gradient_of_what_made_it_is_zero_not_missing():
    weight = torch.randn(3, 4, requires_grad=True)
    merged = merge_audio_embeddings(torch.randn(5, 4), torch.empty(0, 3) @ weight, torch.empty(0, dtype=torch.int64))
    merged.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))


def test_merge_leaves_its_input_alone():
    tokens = torch.zeros(3, 2)
    merge_audio_embeddings(tokens, torch.ones(1, 2), torch.tensor([1]))
    assert not tokens.any()


def test_merge_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 audio embeddings for 1 placeholders"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(2, 2), torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(1, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([1]))


def test_importing_the_kernels_does_not_import_megatron():
    code = "import sys, step_kernels; assert not {'megatron', 'step_megatron', 'transformers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
