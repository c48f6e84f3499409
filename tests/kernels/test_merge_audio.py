"""merge_audio_embeddings puts every row at its place, with gradients, by every backend; the kernels stand without Megatron."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import merge_audio_embeddings, merge_audio_embeddings_
from step_kernels.merge_audio import _backward_op, _op, _place, check_audio_counts, merge_audio_embeddings_reference
from support.cuda_emulation import CUDA, EmulationError, launch
from support.kernel_checks import backends_here, forced

BACKENDS = backends_here("merge_audio_embeddings")


def in_place(tokens, audio, positions):
    """The op in place, of an embedding's result."""
    return merge_audio_embeddings_(tokens.clone(), audio, positions)


FORMS = [merge_audio_embeddings, in_place]


def test_it_has_its_fast_backends_here():
    assert {"cpp", "cuda"} <= set(BACKENDS)


@pytest.mark.parametrize("merge", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    trailing=st.sampled_from([(1,), (4,), (1, 40), (3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    needed=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 9),
)
def test_merge_and_its_gradients_equal_the_reference(backend, merge, length, share, trailing, dtype, needed, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(length, generator=generator)[: round(share * length)]
    if seed % 2:
        positions = positions.sort().values
    values = [torch.randn(count, *trailing, generator=generator).to(dtype) for count in (length, len(positions))]
    cotangent = torch.randn(length, *trailing, generator=generator).to(dtype)
    ours, theirs = ([x.clone().requires_grad_(wanted) for x, wanted in zip(values, needed, strict=True)] for _ in range(2))
    with forced(backend):
        actual = merge(*ours, positions)
        actual.backward(cotangent)
    expected = merge_audio_embeddings_reference(*theirs, positions)
    assert torch.equal(actual, expected)
    if expected.requires_grad:
        expected.backward(cotangent)
    for mine, reference in zip(ours, theirs, strict=True):
        if mine.requires_grad:
            assert torch.equal(mine.grad, torch.zeros_like(mine) if reference.grad is None else reference.grad)


@pytest.mark.parametrize("merge", FORMS)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_gradients_in_float64(backend, merge):
    tokens, audio = (torch.randn(count, 3, dtype=torch.float64, requires_grad=True) for count in (5, 2))
    with forced(backend):
        assert torch.autograd.gradcheck(merge, (tokens, audio, torch.tensor([3, 0])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_audio_the_gradient_of_what_made_it_is_zero_not_missing(backend):
    weight = torch.randn(3, 4, requires_grad=True)
    with forced(backend):
        merged = merge_audio_embeddings(torch.randn(5, 4), torch.empty(0, 3) @ weight, torch.empty(0, dtype=torch.int64))
        merged.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_leaves_its_input_alone_and_takes_strides(backend):
    tokens, audio = torch.randn(6, 3).t(), torch.randn(6, 1).t()
    before, positions = tokens.clone(), torch.tensor([9, 1, 9])[1::2]
    with forced(backend):
        merged = merge_audio_embeddings(tokens, audio, positions)
        merged[0] += 1
    assert torch.equal(tokens, before)
    assert torch.equal(merged[1], audio[0]) and torch.equal(merged[2], before[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_writes_the_rows_of_audio_into_the_tokens(backend):
    embedding = torch.nn.Embedding(7, 4)
    tokens = embedding(torch.arange(6))
    memory, before = tokens.data_ptr(), tokens.detach().clone()
    audio, positions = torch.randn(2, 4, requires_grad=True), torch.tensor([4, 1])
    with forced(backend):
        merged = merge_audio_embeddings_(tokens, audio, positions)
        assert merged.data_ptr() == memory
        assert torch.equal(merged, before.index_copy(0, positions, audio.detach()))
        (3 * merged).sum().backward()
    wanted = torch.full((7, 4), 3.0)
    wanted[[1, 4, 6]] = 0
    assert torch.equal(embedding.weight.grad, wanted) and torch.equal(audio.grad, torch.full((2, 4), 3.0))


def test_in_place_refuses_what_it_would_destroy():
    audio, positions = torch.zeros(1, 4), torch.tensor([1])
    parameter = torch.zeros(5, 4, requires_grad=True)
    for leaf in (parameter, parameter[:3], parameter.view_as(parameter)):
        with pytest.raises(ValueError, match="leaf that requires gradients"):
            merge_audio_embeddings_(leaf, audio, positions)
    with pytest.raises(ValueError, match="not contiguous"):
        merge_audio_embeddings_(torch.zeros(4, 3).t(), audio, positions)
    # What squares the tokens needs their values for its backward pass.
    tokens = torch.ones(3, 4, requires_grad=True) * 2
    squares = tokens**2
    merged = merge_audio_embeddings_(tokens, audio, positions)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (merged.sum() + squares.sum()).backward()


def test_a_position_outside_is_an_error():
    arguments = torch.zeros(3, 2), torch.zeros(1, 2), torch.tensor([3])
    for merge in FORMS:
        with forced("cpp"), pytest.raises(RuntimeError, match="outside the 3 tokens"):
            merge(*arguments)
    with forced("cuda"), pytest.raises(EmulationError, match="__trap"):
        merge_audio_embeddings(*arguments)


def test_cuda_moves_rows_that_are_not_aligned():
    tokens, audio, positions = torch.randn(4, 6), torch.randn(1, 6), torch.tensor([2])
    for row_bytes in (24, 8, 2):
        rows = 96 // row_bytes
        expected = tokens.view(torch.uint8).view(rows, row_bytes).clone()
        expected[2] = audio.view(torch.uint8).view(-1)[:row_bytes]
        launch(CUDA / "merge_audio.cu", "step_merge_audio", audio, positions, 1, tokens, rows, row_bytes)
        assert torch.equal(tokens.view(torch.uint8).view(rows, row_bytes), expected)
    with pytest.raises(EmulationError, match="refused"):
        launch(CUDA / "merge_audio.cu", "step_merge_audio", audio, positions, 1, tokens, 32, 3)
    source, nothing = torch.empty(4, dtype=torch.int32), ctypes.c_void_p(0)
    launch(CUDA / "merge_audio.cu", "step_merge_audio_backward", tokens, torch.tensor([2]), 1, source, nothing, audio, 4, 24)
    assert torch.equal(audio[0], tokens[2])


@pytest.mark.parametrize("count", [0, 2])
def test_registration(count):
    values = torch.randn(5, 1, 4, requires_grad=True), torch.randn(count, 1, 4, requires_grad=True), torch.arange(count)
    torch.library.opcheck(_op.registered, (*values, "cpp"))
    torch.library.opcheck(_place.registered, (*(each.detach() for each in values), "cpp"))
    for of_tokens in (True, False):
        torch.library.opcheck(_backward_op.registered, (torch.randn(5, 1, 4), torch.arange(count), "cpp", of_tokens))


def test_merge_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 audio embeddings for 1 placeholders"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(2, 2), torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(1, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit"):
        merge_audio_embeddings(torch.zeros(3, 2), torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([1]))


def test_a_mismatch_names_the_sample():
    check_audio_counts(["a", "b"], [3, 4], [3, 4])
    with pytest.raises(ValueError, match="b has 4 placeholders in the text, but its audio gives 5 embeddings"):
        check_audio_counts(["a", "b"], [3, 4], [3, 5])
    with pytest.raises(ValueError, match="2 names, 1 placeholder counts"):
        check_audio_counts(["a", "b"], [3], [3, 5])


def test_the_model_names_the_sample_too():
    from step_megatron.model.audio_lm import AudioLanguageModel
    from step_megatron.model.batch import ModelBatch

    embedding = SimpleNamespace(embedding=lambda **_: torch.zeros(4, 1, 2))
    model = SimpleNamespace(language_model=embedding, adaptor=SimpleNamespace(tokens_out=lambda frames: (frames + 1) // 2))
    batch = ModelBatch(torch.zeros(1, 4), None, audio_features=torch.zeros(5, 2), audio_positions=torch.tensor([1, 2]))
    batch.encoder_frames, batch.audio_names, batch.audio_tokens = (5,), ("sample 7",), (2,)
    with pytest.raises(ValueError, match="sample 7 has 2 placeholders in the text, but its audio gives 3"):
        AudioLanguageModel.embed(model, batch)


def test_importing_the_kernels_does_not_import_megatron():
    code = "import sys, step_kernels; assert not {'megatron', 'step_megatron', 'transformers'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
