"""Packed attention, bidirectional and causal: equals its definition in float64 by every backend, log-sum-exp and gradients
included; segments never mix; a segment's bits depend on itself alone."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import audio_attention, audio_attention_varlen, causal_attention, causal_attention_varlen, registry
from step_kernels.audio_attention import audio_attention_varlen_reference
from step_kernels.causal_attention import causal_attention_varlen_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced
from support.triton_faults import with_fault

BACKENDS = backends_here("causal_attention_varlen")
# Triton's interpreter takes about 10 ms for a tile.
EXAMPLES = {"cpp": 20, "torch": 6, "triton": 3}
LENGTHS = st.lists(st.integers(0, 40) | st.sampled_from([48, 49, 64, 97]), max_size=5)
LONG = [1, 650, 0, 7]
KERNELS = [backend for backend in BACKENDS if backend != "torch"]


def qkv(rows: int, heads: int, kv_heads: int, dim: int = 64, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, count, dim, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)]


class Case:
    """One call of an op, and of its definition in any dtype; `causal` or with `valid` keys."""

    def __init__(self, lengths: Sequence[int], valid: Sequence[int] | None, causal: bool, scale: float = 0.2):
        self.lengths, self.valid, self.causal, self.scale = lengths, valid, causal, scale

    def op(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cu_seqlens = cumulative(self.lengths)
        if self.causal:
            return causal_attention_varlen(*inputs, cu_seqlens, self.lengths, self.scale, return_lse=True)
        return audio_attention_varlen(*inputs, cu_seqlens, self.lengths, self.valid, self.scale, return_lse=True)

    def reference(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.causal:
            out = causal_attention_varlen_reference(query, key, value, self.lengths, self.scale)
        else:
            out = audio_attention_varlen_reference(query, key, value, self.lengths, self.valid or self.lengths, self.scale)
        return out, torch.cat([query[:0, :, 0], *self._lse(query, key)])

    def _lse(self, query, key):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        for q, k, keys in zip(query.split(self.lengths), key.split(self.lengths), self.valid or self.lengths, strict=True):
            scores = self.scale * torch.einsum("qhd,khd->qhk", q, k[:keys])
            if self.causal:
                scores = scores.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1)[:, None], float("-inf"))
            yield scores.logsumexp(2)

    def compare(self, backend: str, inputs: Sequence[torch.Tensor], gradients: bool) -> None:
        """Hold output, log-sum-exp and, if asked for, the gradients through both against the definition."""
        results = []
        for function, dtype in ((self.op, inputs[0].dtype), (self.reference, torch.float64), (self.reference, inputs[0].dtype)):
            parts = [part.to(dtype).detach().requires_grad_(gradients) for part in inputs]
            with forced(backend):
                out, lse = function(*parts)
                if gradients:
                    generator = torch.Generator().manual_seed(1)
                    weights = [torch.randn(result.shape, generator=generator).to(result.dtype) for result in (out, lse)]
                    torch.autograd.backward((out, lse), weights)
            # Of a segment of one key, the gradients of query and key are zero: they are judged by the size of all three.
            grads = [part.grad.flatten() for part in parts if part.grad is not None]
            results.append([out.detach(), lse.detach().to(dtype), torch.cat([out.detach()[:0].flatten(), *grads])])
        for actual, exact, plain in zip(*results, strict=True):
            assert_as_good_as_plain(actual, exact, plain)


def test_they_have_a_fast_backend_here():
    assert "cpp" in backends_here("audio_attention_varlen") and "cpp" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_audio_equals_its_definition(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(lengths=LENGTHS, dim=st.sampled_from([16, 64, 128]), data=st.data())
    def check(lengths, dim, data):
        valid = [data.draw(st.integers(min(1, length), length)) for length in lengths]
        Case(lengths, valid, False).compare(backend, qkv(sum(lengths), 2, 2, dim), gradients=0 < sum(lengths) < 150)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_equals_its_definition(backend):
    @settings(max_examples=EXAMPLES[backend])
    @given(lengths=LENGTHS, dim=st.sampled_from([16, 64, 128]), heads=st.sampled_from([(2, 2), (3, 1), (4, 2)]))
    def check(lengths, dim, heads):
        Case(lengths, None, True).compare(backend, qkv(sum(lengths), *heads, dim), gradients=0 < sum(lengths) < 150)

    check()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_triton_in_half_precision(causal, dtype, dim):
    # More than a tile of 128 rows beside tiny segments.
    lengths = [150, 3, 0, 31]
    inputs = qkv(sum(lengths), 2 if causal else 1, 1, dim, dtype)
    Case(lengths, None if causal else [131, 1, 0, 31], causal, dim**-0.5).compare("triton", inputs, gradients=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_faults_are_caught(backend):
    # A mask or a boundary that is off by one.
    for case, wrong in (
        (Case([40, 9], [39, 9], False), Case([40, 9], [40, 9], False)),
        (Case([40, 9], None, True), Case([41, 8], None, True)),
        (Case([40, 9], None, True), Case([40, 9], None, False)),
    ):
        case.op = wrong.op
        with pytest.raises(AssertionError, match="off by"):
            case.compare(backend, qkv(49, 2, 2), gradients=False)


@pytest.mark.parametrize(
    ("kernel", "causal", "old", "new"),
    [
        # A mask is gone or off by one.
        ("_forward", False, "mask = keys < end", "mask = keys <= end"),
        ("_forward", True, "mask & (keys <= queries)", "mask & (keys < queries + 2)"),
        ("_backward_query", True, "mask & (keys <= queries)", "mask"),
        (
            "_backward_key",
            True,
            "scores = tl.where(keys[:, None] <= rows[None, :], scores",
            "scores = tl.where(keys[:, None] < 99, scores",
        ),
        # A boundary is off by one.
        ("_forward", False, "return end // BLOCK_N * BLOCK_N, end", "return 0 * end, end - 1"),
        # What was summed before is not brought to the new maximum; the sum lacks the maximum; a term has another sign.
        ("_forward", False, "total = total * shrink", "total = total"),
        ("_forward", False, "natural = (top + tl.log2(total))", "natural = tl.log2(total)"),
        ("_delta", False, "total -= tl.load", "total += tl.load"),
        ("_backward_key", False, "weights * (products - share[None, :])", "weights * products"),
        (
            "_backward_key",
            True,
            "for head in range(kv_head * group, (kv_head + 1) * group)",
            "for head in range(kv_head, kv_head + group)",
        ),
    ],
)
def test_a_fault_in_the_triton_kernels_is_noticed(tmp_path, kernel, causal, old, new):
    case = Case([40, 9], None if causal else [39, 9], causal)
    inputs = qkv(49, 4, 2 if causal else 4)
    with with_fault(tmp_path, "packed_attention_triton", kernel, old, old):
        case.compare("triton", inputs, gradients=True)
    with with_fault(tmp_path, "packed_attention_triton", kernel, old, new), pytest.raises(AssertionError, match="off by"):
        case.compare("triton", inputs, gradients=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [32, 80, 256])
def test_long_segments_carry_the_softmax_on(causal, dim):
    # More keys than a chunk of the C++ kernel holds, beside tiny segments.
    inputs = qkv(sum(LONG), 2, 1 if causal else 2, dim)
    Case(LONG, None if causal else [1, 601, 0, 2], causal).compare("cpp", inputs, gradients=True)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_of_the_torch_path(causal):
    inputs = [part.requires_grad_() for part in qkv(6, 2, 1 if causal else 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(Case([3, 0, 1, 2], None if causal else [2, 0, 1, 2], causal).op, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_other_content_next_door_changes_nothing(backend, causal):
    # Two of one length side by side share a call of the torch backend; the third has its own.
    lengths = [6, 6, 9]
    inputs = qkv(21, 2, 2)
    changed = [part.clone() for part in inputs]
    for part in changed:
        part[6:12] = 50.0
    with forced(backend):
        before, after = (Case(lengths, None, causal).op(*parts) for parts in (inputs, changed))
    for one, other in zip(before, after, strict=True):
        assert [torch.equal(a, b) for a, b in zip(one.split(lengths), other.split(lengths), strict=True)] == [True, False, True]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_bits_depend_neither_on_companions_nor_on_threads(backend, causal):
    lengths = [35, 3, 9] if backend == "triton" else [70, 5, 700, 61]
    gradients = []
    for threads, chosen in ((1, range(len(lengths))), (2, range(len(lengths))), (1, [0])):
        torch.set_num_threads(threads)
        parts = [
            part[: sum(lengths[: len(chosen)])].clone().requires_grad_() for part in qkv(sum(lengths), 4, 2 if causal else 4)
        ]
        with forced(backend):
            out, lse = Case([lengths[index] for index in chosen], None, causal).op(*parts)
            (out.square().sum() + lse.sum()).backward()
        gradients.append([part[: lengths[0]] for part in (out, lse, *(part.grad for part in parts))])
    torch.set_num_threads(1)
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_ignores_the_future(backend):
    inputs = qkv(10, 2, 2)
    changed = [part.clone() for part in inputs]
    for part in changed:
        part[7:] = 50.0
    with forced(backend):
        before, after = (causal_attention_varlen(*part, cumulative([10]), [10]) for part in (inputs, changed))
    assert torch.equal(before[:7], after[:7]) and not torch.equal(before[7:], after[7:])


@pytest.mark.parametrize("backend", KERNELS)
def test_slices_of_a_fused_projection_are_taken_without_a_copy(backend):
    fused = torch.randn(20, 4, 3, 64, generator=torch.Generator().manual_seed(3))
    views = fused.unbind(2)
    copies = [part.contiguous() for part in views]
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in copies]
    with forced(backend):
        expected = Case([13, 7], None, True).op(*copies)
        for parts in (views, strided):
            assert all(torch.equal(a, b) for a, b in zip(Case([13, 7], None, True).op(*parts), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_not_swallowed(backend, place):
    inputs = qkv(50, 2, 2)
    inputs[place][20, 0, 5] = float("nan")
    with forced(backend):
        out, _ = Case([20, 30], None, False).op(*inputs)
    rows = slice(20, 21) if place == 0 else slice(20, 50)
    assert out[rows, 0].isnan().any(1).all() and not out[:20].isnan().any() and not out[:, 1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    inputs = [1000 * part for part in qkv(33, 2, 2)]
    with forced(backend):
        out, lse = Case([33], None, True).op(*inputs)
    exact, exact_lse = Case([33], None, True).reference(*(part.double() for part in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)


def test_sizes_that_the_kernels_do_not_take_go_to_torch_and_are_counted():
    registry.chosen.clear()
    causal_attention_varlen(*qkv(4, 2, 2, 24), cumulative([4]), [4])
    assert registry.chosen == {("causal_attention_varlen", "torch"): 1}
    with (
        registry.forced("cpp"),
        pytest.raises(RuntimeError, match="take a head dimension of 24"),
    ):
        causal_attention_varlen(*qkv(4, 2, 2, 24), cumulative([4]), [4])


@pytest.mark.parametrize("op", [audio_attention_varlen, causal_attention_varlen])
def test_inputs_that_do_not_fit_are_refused(op):
    with pytest.raises(ValueError, match="hold 9 rows, but the packed tensor has 10"):
        op(*qkv(10, 2, 2), cumulative([4, 5]), [4, 5])
    with pytest.raises(ValueError, match="cu_seqlens describes 1 segments, the host lengths 2"):
        op(*qkv(10, 2, 2), cumulative([10]), [4, 6])
    query, key, value = qkv(10, 2, 2)
    with pytest.raises(ValueError, match="of one number of rows and one width"):
        op(query, key, value[:9], cumulative([10]), [10])


def test_a_segment_without_a_valid_frame_is_refused():
    with pytest.raises(ValueError, match="needs 1..length valid frames"):
        audio_attention_varlen(*qkv(4, 2, 2), cumulative([4]), [4], [0])


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        causal_attention_varlen(*qkv(4, 3, 2), cumulative([4]), [4])


def test_a_compiled_caller_gets_the_same_kernel():
    inputs = [part.requires_grad_() for part in qkv(9, 2, 2)]
    compiled = torch.compile(lambda *parts: 2 * Case([4, 5], None, True).op(*parts)[0], fullgraph=True, backend="aot_eager")
    out = compiled(*inputs)
    out.sum().backward()
    assert torch.equal(out, 2 * Case([4, 5], None, True).op(*inputs)[0]) and inputs[1].grad.isfinite().all()


@pytest.mark.parametrize("lengths", [[5, 4, 0, 1], []])
@pytest.mark.parametrize("op", [audio_attention._op, causal_attention._op])
def test_registration(op, lengths):
    inputs = [part.requires_grad_() for part in qkv(sum(lengths), 2, 2)]
    torch.library.opcheck(op.registered, (*inputs, cumulative(lengths), lengths, [], 0.2, "cpp"))
