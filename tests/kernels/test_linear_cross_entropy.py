"""linear_cross_entropy: both modes equal their definitions by every backend, whole and shared out over ranks; faults are loud."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from step_kernels import linear_cross_entropy, linear_log_probs
from step_kernels.bench.harness import extra_bytes
from step_kernels.linear_cross_entropy import (
    _BUFFER_BYTES,
    _ROWS,
    _log_probs,
    _op,
    chunk_rows,
    linear_cross_entropy_reference,
    linear_log_probs_reference,
)
from step_kernels.softmax_rows import gradient_torch, statistics_torch
from support.kernel_checks import TOLERANCE, backends_here, forced

BACKENDS = backends_here("linear_cross_entropy")
# Every backend in the types that it is for; torch in float64 is held against the definition to rounding.
CASES = [
    *((backend, torch.float32) for backend in BACKENDS),
    *((backend, torch.bfloat16) for backend in BACKENDS if backend != "cpp"),
    ("torch", torch.float64),
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one smaller, for the few tokens of a test."""
    monkeypatch.setitem(_ROWS, "cpu", 32)


def inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def run(mode, dtype: torch.dtype, arguments: tuple[torch.Tensor, ...], seed: int = 5) -> list[torch.Tensor]:
    """Values and gradients of a mode, for inputs of another type; the gradients of the outputs are the same for all types."""
    hidden, weight = (each.detach().to(dtype).requires_grad_() for each in arguments[:2])
    generator = torch.Generator().manual_seed(seed)
    labels, weights = arguments[2], torch.rand(len(arguments[2]), generator=generator).round(decimals=1)
    if getattr(mode, "func", mode) in (linear_cross_entropy, linear_cross_entropy_reference):
        total, losses = mode(hidden, weight, labels, weights)
        (total * 1.5).backward()
        return [total.detach(), losses, hidden.grad, weight.grad]
    log_probs, entropy = mode(hidden, weight, labels)
    cotangents = torch.randn(2, len(labels), generator=generator)
    ((log_probs * cotangents[0]).sum() + (entropy * cotangents[1]).sum()).backward()
    return [log_probs.detach(), entropy.detach(), hidden.grad, weight.grad]


MODES = [(linear_cross_entropy, linear_cross_entropy_reference), (linear_log_probs, linear_log_probs_reference)]


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


def check(mode, reference, backend: str, dtype: torch.dtype, arguments: tuple[torch.Tensor, ...]) -> None:
    with forced(backend):
        actual = run(mode, dtype, arguments)
    exact, plain = run(reference, torch.float64, arguments), run(reference, dtype, arguments)
    # What comes out in float32 of inputs in bfloat16 is as exact as these; the weight's gradient is rounded once a chunk.
    times, floor = (4.0, 1e-11) if dtype == torch.float64 else TOLERANCE[dtype]
    times += (dtype == torch.bfloat16) * (len(arguments[0]) > 32)
    for name, *each in zip(("first", "second", "hidden.grad", "weight.grad"), actual, exact, plain, strict=True):
        assert each[0].dtype == each[2].dtype and each[0].shape == each[1].shape
        error, allowed = ((values.double() - each[1]).abs().max() for values in (each[0], each[2]))
        limit = max(times * allowed, floor * each[1].abs().max(), floor)
        assert error <= limit, f"{name} is off by {error:.2e}, the plain way by {allowed:.2e}, allowed {limit:.2e}"


@pytest.mark.parametrize(("mode", "reference"), MODES, ids=["loss", "log-probs"])
@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case[0] != "triton"])
@settings(max_examples=20)
@given(tokens=st.integers(1, 70), width=st.sampled_from([1, 16, 33]), vocabulary=st.sampled_from([1, 2, 15, 40, 2100]))
def test_equals_the_definition_in_float64(mode, reference, backend, dtype, tokens, width, vocabulary):
    check(mode, reference, backend, dtype, inputs(tokens, width, vocabulary, dtype))


@pytest.mark.parametrize(("mode", "reference"), MODES, ids=["loss", "log-probs"])
@pytest.mark.parametrize(("backend", "dtype"), [case for case in CASES if case[0] == "triton"])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(3, 1), (3, 15), (34, 40), (3, 200)])
def test_kernels_in_triton_equal_the_definition(mode, reference, backend, dtype, tokens, vocabulary, monkeypatch):
    monkeypatch.setattr("step_kernels.softmax_rows._BLOCK", 64)  # several blocks a row
    check(mode, reference, backend, dtype, inputs(tokens, 16, vocabulary, dtype))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "cpp"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_float16_gradients_are_formed_with_the_loss_scale(backend, scale):
    """Probabilities far below float16's smallest number (6e-8 as they are, 4e-3 after the scale) count as in eager torch."""
    hidden, weight, labels = inputs(40, 32, 1500, torch.float16)
    weights = torch.full((40,), 1 / 4096)  # the share of a token in a step's mean

    def gradients(mode, dtype: torch.dtype, factor: float) -> list[torch.Tensor]:
        leaves = [each.detach().to(dtype).requires_grad_() for each in (hidden, weight)]
        total, losses = mode(*leaves, labels, weights)
        assert not losses.requires_grad
        (total * factor).backward()
        return [leaf.grad.double() / factor for leaf in leaves]

    exact = gradients(linear_cross_entropy_reference, torch.float64, 1.0)
    plain = gradients(linear_cross_entropy_reference, torch.float16, scale)
    with forced(backend):
        actual = gradients(linear_cross_entropy, torch.float16, scale)
    for name, *each in zip(("hidden", "weight"), actual, plain, exact, strict=True):
        error, allowed = ((values - each[2]).norm() / each[2].norm() for values in each[:2])
        assert error <= 1.1 * allowed, f"{name}'s gradient is off by {error:.1e}, eager's by {allowed:.1e}"
        assert scale == 1 or error < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_logit_neither_overflows_nor_hides_the_others(backend):
    hidden, weight = torch.tensor([[300.0], [-300.0]]), torch.tensor([[1.0], [0.999], [-1.0]])
    labels = torch.tensor([1, 0])
    with forced(backend):
        _, losses = linear_cross_entropy(hidden, weight, labels)
        log_probs, entropy = linear_log_probs(hidden, weight, labels)
    exact, exact_entropy = linear_log_probs_reference(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(losses.double(), -exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(log_probs.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_hidden_state_is_seen_in_its_loss_and_gradient_alone(backend, value):
    hidden, weight, labels = inputs(5, 8, 50, torch.float32)
    hidden = hidden.detach().index_fill(0, torch.tensor([2]), value).requires_grad_()
    with forced(backend):
        total, losses = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.isnan() and losses.isnan().tolist() == [False, False, True, False, False]
    assert hidden.grad.isnan().any(1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_of_weight_zero_change_nothing_whatever_their_label(backend):
    hidden, weight, labels = inputs(9, 8, 50, torch.float32)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1, 1])
    with forced(backend):
        total, _ = linear_cross_entropy(hidden, weight, labels.where(mask > 0, -100), mask)
        total.backward()
        expected, _ = linear_cross_entropy(hidden[mask > 0], weight, labels[mask > 0])
    torch.testing.assert_close(total, expected)
    assert hidden.grad[mask == 0].eq(0).all()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("mode", [linear_cross_entropy, linear_log_probs])
def test_only_the_gradients_that_are_wanted_are_formed(mode, wanted):
    hidden, weight, labels = inputs(40, 8, 50, torch.float32)
    hidden.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    first, _ = mode(hidden, weight, labels)
    assert first.requires_grad is any(wanted)
    if any(wanted):
        first.sum().backward()
    assert ((hidden.grad is not None), (weight.grad is not None)) == wanted


def test_no_tokens_give_nothing_and_zero_gradients():
    hidden, weight, labels = inputs(0, 8, 50, torch.float32)
    total, losses = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.item() == 0 and losses.shape == (0,) and weight.grad.eq(0).all() and weight.grad.shape == weight.shape
    log_probs, entropy = linear_log_probs(hidden, weight, labels)
    assert log_probs.shape == entropy.shape == (0,)


def test_strided_inputs_are_taken():
    hidden, weight, labels = inputs(40, 16, 50, torch.float32)
    views = hidden.detach().t().contiguous().t().requires_grad_(), weight.detach().t().contiguous().t().requires_grad_()
    for each in (views, (hidden, weight)):
        linear_cross_entropy(*each, labels)[0].backward()
    torch.testing.assert_close(views[0].grad, hidden.grad)
    torch.testing.assert_close(views[1].grad, weight.grad)


def test_the_weights_gradient_is_handed_over_not_copied():
    hidden, weight, labels = inputs(40, 8, 50, torch.float32)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    formed = total.grad_fn.gradients[1].data_ptr()
    total.backward(retain_graph=True)
    assert weight.grad.data_ptr() == formed
    with pytest.raises(RuntimeError, match="formed once"):
        total.backward()


def test_chunks_are_nearly_equal_and_bounded():
    with mock.patch.dict(_ROWS, cpu=512):
        assert chunk_rows(1024, 152_064, 4, "cpu") == 256
        assert chunk_rows(4096, 158_720, 2, "cuda") == 1024
        assert chunk_rows(600, 4096, 4, "cpu") == 320
        assert chunk_rows(300, 4096, 4, "cpu") == 300
        assert chunk_rows(7, 10**9, 4, "cpu") == 7 and chunk_rows(100, 10**9, 4, "cpu") == 32
        assert chunk_rows(0, 4096, 4, "cpu") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "must be"),
        ({"hidden": torch.zeros(3, 4).bfloat16()}, "cast one of them"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "labels must be int64"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels must be int64 \[3\]"),
        ({"token_weights": torch.ones(1, 3)}, "give one a token"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("tokens", [5, 0])
def test_registration(tokens):
    hidden, weight, labels = inputs(tokens, 8, 50, torch.float32)
    torch.library.opcheck(_op.registered, (hidden, weight, labels, torch.ones(tokens), 0, 50, "", True, True))
    torch.library.opcheck(_log_probs.registered, (hidden, weight, labels, 0, 50, "", True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_liger_kernel_agrees(dtype):
    """Its kernels, under Triton's interpreter as ours; a token that it ignores is one of weight 0."""
    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    hidden, weight, labels = inputs(40, 16, 200, dtype)
    mask = torch.arange(40) % 5 > 0
    theirs = fused(weight, hidden, labels.where(mask, -100))
    with forced("triton"):
        ours, _ = linear_cross_entropy(hidden, weight, labels, mask.float())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for name, *each in zip(
        ("sum", "hidden.grad", "weight.grad"),
        (ours, *torch.autograd.grad(ours * 1.5, (hidden, weight))),
        (theirs, *torch.autograd.grad(theirs * 1.5, (hidden, weight))),
        strict=True,
    ):
        error, largest = (each[0] - each[1]).abs().max(), each[1].abs().max()
        assert error <= tolerance * largest, f"{name} is off by {error:.1e} of {largest:.1e}"


class LossAfresh(torch.autograd.Function):
    """The loss mode for a check that differentiates several times: its gradients are formed once, so it is called each time."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return linear_cross_entropy(*inputs)[0]

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, labels, token_weights = ctx.saved_tensors
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        with torch.enable_grad():
            total, _ = linear_cross_entropy(*leaves, labels, token_weights)
        return *torch.autograd.grad(total, leaves, gradient), None, None


def test_loss_passes_gradcheck():
    arguments = *inputs(4, 3, 7, torch.float64), torch.tensor([1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(LossAfresh.apply, arguments)


def test_log_probs_pass_gradcheck():
    hidden, weight, labels = inputs(4, 3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda *each: linear_log_probs(*each, labels), (hidden, weight))


# Rows of each of two ranks, of which the last may be padding; chunks of 32 tokens are cut for 31 rows in all these types, and as
# many as 64 for a row less.
SHARE = 31
CHUNK_BYTES = {torch.float16: 3900, torch.float32: 7800}


def shared_out(rank, world_size, backend, dtype, vocabulary):
    """Both modes with a share of the vocabulary on each rank: hidden's results, and this rank's part of the weight's gradient."""
    from step_megatron.config.schema import Config, RunConfig
    from step_megatron.runtime.device import initialize, shutdown

    initialize(Config(run=RunConfig(threads=1)))
    try:
        hidden, weight, labels = inputs(70, 16, vocabulary, dtype)
        # Whatever padding holds does not matter.
        padded = torch.cat((weight.detach(), weight.new_full((world_size * SHARE - vocabulary, 16), 100.0)))
        mine = padded[rank * SHARE : (rank + 1) * SHARE]
        place = {"vocabulary_start": rank * SHARE, "group": torch.distributed.group.WORLD, "vocabulary": vocabulary}
        with forced(backend), mock.patch.dict(_ROWS, cpu=512), mock.patch.dict(_BUFFER_BYTES, cpu=CHUNK_BYTES[dtype]):
            assert [chunk_rows(70, rows, dtype.itemsize, "cpu") for rows in (SHARE, SHARE - 1)] == [32, 64]
            return [run(partial(mode, **place), dtype, (hidden, mine, labels)) for mode, _ in MODES]
    finally:
        shutdown()


@pytest.mark.parametrize("vocabulary", [2 * SHARE, 2 * SHARE - 1, SHARE])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cpp", torch.float32), ("torch", torch.float32), ("torch", torch.float16), ("triton", torch.float16)]
)
def test_a_vocabulary_shared_out_over_ranks_gives_the_same(backend, dtype, vocabulary, worker_pool):
    """With a padding of no row, one, or a whole share."""
    ranks = worker_pool(2).run(shared_out, {"backend": backend, "dtype": dtype, "vocabulary": vocabulary})
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    for index, (mode, _) in enumerate(MODES):
        whole = run(mode, torch.float32, inputs(70, 16, vocabulary, dtype))
        results = [each[index] for each in ranks]
        for name, *each in zip(("first", "second", "hidden.grad"), *results, whole, strict=False):
            assert torch.equal(each[0], each[1]), f"{name} differs between ranks"
            assert (each[0] - each[2]).norm() <= tolerance * each[2].norm(), name
        gradient = torch.cat([each[3] for each in results])
        assert (gradient[:vocabulary] - whole[3]).norm() <= tolerance * whole[3].norm()
        assert not gradient[vocabulary:].any()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_padding_changes_nothing(backend, dtype):
    hidden, weight, labels = inputs(34, 16, 37, dtype)
    padded = torch.cat((weight.detach(), weight.new_full((27, 16), 100.0)))
    for mode, _ in MODES:
        with forced(backend):
            expected = run(mode, dtype, (hidden, weight, labels))
            actual = run(partial(mode, vocabulary=37), dtype, (hidden, padded, labels))
        assert not actual[3][37:].any()
        for one, two in zip((*actual[:3], actual[3][:37]), expected, strict=True):
            torch.testing.assert_close(one, two)


def wrong_share(rank, world_size, vocabulary, rows):
    """The error of one rank; the other one, whose share may be right, does not call the op."""
    from step_megatron.config.schema import Config, RunConfig
    from step_megatron.runtime.device import initialize, shutdown

    initialize(Config(run=RunConfig(threads=1)))
    try:
        if rank == 1:
            start = SHARE
            with pytest.raises(ValueError) as error:
                hidden, weight, labels = inputs(3, 4, rows, torch.float32)
                linear_cross_entropy(hidden, weight, labels, None, start, torch.distributed.group.WORLD, vocabulary)
            return str(error.value)
    finally:
        shutdown()


def test_shares_of_different_sizes_are_refused(worker_pool):
    """Their ranks would cut the tokens into different chunks, and wait for each other's messages."""
    message = worker_pool(2).run(wrong_share, {"vocabulary": None, "rows": SHARE - 1})[1]
    assert "rank 1 has 30 rows from id 31 on, not from 30" in message and "pad" in message
    message = worker_pool(2).run(wrong_share, {"vocabulary": 2 * SHARE + 1, "rows": SHARE})[1]
    assert "vocabulary is 63" in message


@pytest.mark.parametrize("vocabulary", [0, 7, -1])
def test_a_vocabulary_that_the_weight_has_not_is_refused(vocabulary):
    with pytest.raises(ValueError, match="vocabulary is"):
        linear_log_probs(*inputs(3, 4, 6, torch.float32), vocabulary=vocabulary)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_log_probs_without_entropy(backend, dtype):
    hidden, weight, labels = inputs(34, 16, 40, dtype)
    with forced(backend):
        expected, _ = linear_log_probs(hidden, weight, labels)
        actual, entropy = linear_log_probs(hidden, weight, labels, with_entropy=False)
        gradients = [torch.autograd.grad(each.sum(), (hidden, weight)) for each in (actual, expected)]
    assert entropy.numel() == 0 and torch.equal(actual, expected)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_loss_does_not_form_what_only_entropy_needs(dtype):
    hidden, weight, labels = inputs(5, 8, 50, dtype)
    with (
        forced("torch"),
        mock.patch("step_kernels.softmax_rows.statistics_torch", wraps=statistics_torch) as statistics,
        mock.patch("step_kernels.softmax_rows.gradient_torch", wraps=gradient_torch) as gradient,
    ):
        linear_cross_entropy(hidden, weight, labels)[0].backward()
    assert statistics.call_args.args[2] is False and gradient.call_args.args[4] is None


@pytest.mark.parametrize(("backend", "dtype"), [("cpp", torch.float32), ("torch", torch.float16)])
@pytest.mark.parametrize(("mode", "reference"), MODES, ids=["loss", "log-probs"])
def test_the_logits_never_are_there_as_a_whole(mode, reference, backend, dtype):
    """Peak memory: a chunk of 32 tokens, with torch's own copies of it in float32, beside eager's copies of 512."""
    hidden, weight, labels = inputs(512, 4, 20_000, dtype)

    def extra(mode):
        def work():
            first, _ = mode(hidden, weight, labels)
            return first, *torch.autograd.grad(first.sum(), (hidden, weight))

        work()
        return extra_bytes(work, torch.device("cpu"))

    with forced(backend):
        ours = extra(mode)
    assert ours < extra(reference) / 3
