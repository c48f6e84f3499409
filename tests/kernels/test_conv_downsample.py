"""conv_downsample_gelu: equals its definition for any packing, by every backend; neighbours never leak; gradients."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import conv_downsample_gelu, conv_products, native
from step_kernels.conv_downsample import _op, conv_downsample_gelu_reference, downsample_taps, upsample_taps
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced, threads
from support.triton_faults import with_fault

WIDTH, OUT = 12, 7
BACKENDS = backends_here("conv_downsample_gelu")
# Triton's products are for 16-bit types, and its interpreter is slow: it gets cases of its own.
ON_CPU = [backend for backend in BACKENDS if backend != "triton"]
HALF = [(backend, torch.bfloat16) for backend in BACKENDS if backend != "cpp"]
NAMES = ("out", "x.grad", "weight.grad", "bias.grad")
lengths = st.lists(st.integers(0, 9) | st.just(301), max_size=6)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv_rows(lengths: list[int]) -> int:
    return sum((length + 1) // 2 for length in lengths)


def inputs(lengths: list[int], width: int = WIDTH, out: int = OUT, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    scale = (3 * width) ** -0.5
    arguments = [random(sum(lengths), width), scale * random(out, width, 3, seed=1), random(out, seed=2)]
    return [each.to(dtype) for each in arguments]


def run(function, lengths: list[int], arguments: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Result and gradients for inputs of another type."""
    x, weight, bias = (each.detach().to(dtype).requires_grad_() for each in arguments)
    more = [] if function is conv_downsample_gelu_reference else [conv_rows(lengths)]
    out = function(x, cumulative(lengths), weight, bias, *more)
    out.backward(random(*out.shape, seed=3).to(dtype))
    return [out.detach(), x.grad, weight.grad, bias.grad]


def plain_way(x, cu_seqlens, weight, bias, rows):
    """The definition by a matrix product: torch 2.13's conv1d in bfloat16 gives NaN in a small weight's gradient on some CPUs."""
    columns = torch.nn.functional.pad(x, (0, 0, 1, 0))[downsample_taps(cu_seqlens, rows)]
    return torch.nn.functional.gelu(torch.einsum("rti,oit->ro", columns, weight) + bias)


def check(backend: str, dtype: torch.dtype, lengths: list[int], width: int, out: int) -> None:
    arguments = inputs(lengths, width, out, dtype)
    with forced(backend):
        actual = run(conv_downsample_gelu, lengths, arguments, dtype)
    exact = run(conv_downsample_gelu_reference, lengths, arguments, torch.float64) if sum(lengths) else actual
    plain = run(plain_way, lengths, arguments, dtype)
    for values in zip(actual, exact, plain, strict=True):
        assert_as_good_as_plain(*values)


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


@pytest.mark.parametrize("backend", ON_CPU)
@settings(max_examples=30)
@given(lengths=lengths, width=st.sampled_from([1, 12, 40]), out=st.sampled_from([1, 7, 64]))
def test_equals_conv1d_per_segment_in_float64(backend, lengths, width, out):
    check(backend, torch.float32, lengths, width, out)


@pytest.mark.parametrize(("backend", "dtype"), HALF)
@pytest.mark.parametrize(
    ("lengths", "width", "out"), [([3, 0, 1, 6, 2], 12, 7), ([70, 1, 133], 16, 130), ([0], 12, 7), ([], 12, 7)]
)
def test_half_precision_equals_conv1d_per_segment(backend, dtype, lengths, width, out):
    check(backend, dtype, lengths, width, out)


def by_tiles():
    """The C++ backend by tiles, which otherwise pay for many rows only."""
    return mock.patch.multiple(conv_products, _FORWARD_ROWS=-(10**6), _GRADIENT_ROWS=-(10**6))


@settings(max_examples=30)
@given(lengths=lengths, width=st.sampled_from([1, 12, 40]), out=st.sampled_from([1, 7, 64]))
def test_tiles_of_three_outputs_equal_conv1d_too(lengths, width, out):
    with by_tiles():
        check("cpp", torch.float32, lengths, width, out)


@pytest.mark.parametrize("tiles", [False, True])
def test_blocks_of_outputs_join_without_a_seam(tiles, monkeypatch):
    for name in ("_BLOCK_ROWS", "_BLOCK_TILES"):
        monkeypatch.setattr(conv_products, name, 2)
    monkeypatch.setitem(conv_downsample_gelu.__globals__, "_SCATTER_ROWS", 3)
    with by_tiles() if tiles else contextlib.nullcontext():
        check("cpp", torch.float32, [5, 1, 12, 0, 7, 19], 12, 7)


def test_many_rows_go_by_tiles_and_few_do_not(monkeypatch):
    counts = []
    monkeypatch.setattr(conv_products, "_convolve_tiles", lambda source, tiles, *rest: counts.append(tiles))
    for every in ([2000, 1999], [1] * 2000, [300]):
        x, weight, bias = inputs(every, 1, 1)
        with forced("cpp"):
            conv_downsample_gelu(x, cumulative(every), weight, bias, conv_rows(every))
    assert counts == [334 + 334]


@pytest.mark.parametrize("tiles", [False, True])
def test_what_neighbours_hold_changes_no_bit_and_threads_change_little(tiles):
    """The library of the products promises no bits across threads; the size of a pack may choose the other products."""
    lengths, results = [41, 700, 6], []
    x, weight, bias = inputs(lengths, 64, 96)
    for count, before, after in ((1, 1.0, 1.0), (1, 1e4, -1e4), (2, 1.0, 1.0)):
        other = x.clone()
        other[:41] *= before
        other[741:] *= after
        with threads(count), forced("cpp"), by_tiles() if tiles else contextlib.nullcontext():
            results.append(conv_downsample_gelu(other, cumulative(lengths), weight, bias, conv_rows(lengths))[21:371])
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)


def test_the_kernels_around_the_products_give_the_same_bits_for_any_threads():
    """All but the products, on rows and columns enough for several threads; odd widths have a tail."""
    every, width, ops = [410, 0, 1, 700], 133, native.ops()
    x, bounds, rows = random(sum(every), width), cumulative(every), conv_rows(every)
    tiles = sum(((length + 1) // 2 + 2) // 3 for length in every)
    products, columns, hidden = random(5, tiles, width), random(rows, 3 * width), random(rows, width, seed=1)
    weight, results = random(width, width, 3), []
    for count in (1, 2):
        shapes = (rows, 3 * width), (7, tiles, width), (rows, width), (rows, width), (5, tiles, width), (rows, width), (width,)
        gathered, planes, before, out, gradients, slope, total = made = [torch.full(shape, float("nan")) for shape in shapes]
        split, joined, scattered = torch.empty(5, width, width), torch.empty_like(weight), torch.zeros_like(x)
        with threads(count):
            ops.conv_gather(x, bounds, 0, gathered)
            ops.conv_gather(x, bounds, 0, planes)
            ops.conv_join_tiles(products, bounds, hidden[0], 0, before, out)
            ops.conv_gradient_tiles(hidden, bounds, 0, gradients)
            ops.gelu_gradient(hidden, columns[:, :width].contiguous(), slope, total)
            ops.conv_split_weight(weight, split)
            ops.conv_join_weight(split, joined)
            ops.conv_scatter(columns, bounds, 0, scattered)
        results.append([*made, split, joined, scattered])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FORWARD, WEIGHT = "gathered_matmul_kernel", "gathered_weight_gradient_kernel"
TAP = "source = tl.load(taps + row * 3 + tap, mask=row < rows, other=-1)\n        inside = "
PRODUCT, GRADIENT = TAP + "(source >= 0)", TAP + "(row < rows)"


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        (FORWARD, PRODUCT, PRODUCT),
        # A mask is gone: what lies outside a segment reads the pack's first frame.
        (FORWARD, PRODUCT, PRODUCT.replace("other=-1)", "other=-1)\n        source = tl.maximum(source, 0)")),
        (WEIGHT, GRADIENT, GRADIENT.replace("other=-1)", "other=-1)\n        source = tl.maximum(source, 0)")),
        # A boundary is off by one.
        (FORWARD, PRODUCT, PRODUCT.replace(">=", ">")),
        (WEIGHT, GRADIENT, GRADIENT.replace("(row < rows)", "(row < rows - 1)")),
        (WEIGHT, "range(0, rows, BLOCK_K)", "range(0, rows - BLOCK_K, BLOCK_K)"),
        # Taps change places, a sum starts anew, the bias has another sign.
        (FORWARD, PRODUCT, PRODUCT.replace("3 + tap", "3 + 2 - tap")),
        (WEIGHT, GRADIENT, GRADIENT.replace("3 + tap", "3 + 2 - tap")),
        (FORWARD, "tl.dot(left, right, total)", "tl.dot(left, right)"),
        (WEIGHT, "tl.dot(tl.trans(left), right, total)", "tl.dot(tl.trans(left), right)"),
        (FORWARD, "total += tl.load(bias", "total -= tl.load(bias"),
    ],
)
def test_a_fault_in_the_triton_kernels_is_noticed(tmp_path, kernel, old, new):
    caught = contextlib.nullcontext() if old == new else pytest.raises(AssertionError, match="off by")
    with with_fault(tmp_path, "gathered_matmul", kernel, old, new), caught:
        check("triton", torch.bfloat16, [70, 1, 133], 80, 40)


def test_gelu_is_exact_far_out_too():
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e30, -100.0, 100.0, 1e30])])[:, None]
    weight = torch.tensor([[[0.0, 1.0, 0.0]]])
    every = [1] * len(x)
    with forced("cpp"):
        out, x_grad, _, _ = run(conv_downsample_gelu, every, [x, weight, torch.zeros(1)], torch.float32)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide)
    exact.backward(random(*exact.shape, seed=3).double())
    assert ((out - exact).abs() / x.abs().clamp_min(1)).max() < 1e-6
    assert (x_grad - wide.grad).abs().max() < 5e-6


def test_gradients_pass_gradcheck():
    segments = [3, 0, 1, 6, 2]
    arguments = [each.double().requires_grad_() for each in inputs(segments, 3, 4)]
    cu_seqlens, rows = cumulative(segments), conv_rows(segments)
    assert torch.autograd.gradcheck(lambda x, w, b: conv_downsample_gelu(x, cu_seqlens, w, b, rows), arguments)


@pytest.mark.parametrize("backend", ON_CPU)
def test_features_in_bfloat16_are_widened_as_they_are_gathered(backend):
    x, weight, bias = inputs([5, 8])
    narrow = x.bfloat16()
    more = weight.requires_grad_(), bias, conv_rows([5, 8])
    with forced(backend):
        actual = conv_downsample_gelu(narrow, cumulative([5, 8]), *more)
        actual.sum().backward()
        gradient, weight.grad = weight.grad, None
        expected = conv_downsample_gelu(narrow.float(), cumulative([5, 8]), *more)
        expected.sum().backward()
    assert actual.dtype == torch.float32 and torch.equal(actual, expected) and torch.equal(gradient, weight.grad)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_the_gradients_that_are_wanted_are_formed(backend):
    for wanted in ((False, True, True), (True, False, False), (False, False, True)):
        arguments = [each.requires_grad_(want) for each, want in zip(inputs([5, 4]), wanted, strict=True)]
        with forced(backend):
            conv_downsample_gelu(arguments[0], cumulative([5, 4]), *arguments[1:], 5).sum().backward()
        assert tuple(each.grad is not None for each in arguments) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_content_next_door_changes_nothing(backend):
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    x, weight, bias = inputs([5, 4, 3], dtype=dtype)
    cu_seqlens = cumulative([5, 4, 3])
    changed = x.clone()
    changed[5:9] = 1e4
    with forced(backend):
        before, after = (conv_downsample_gelu(part, cu_seqlens, weight, bias, 7) for part in (x, changed))
    same = [torch.equal(a, b) for a, b in zip(before.split((3, 2, 2)), after.split((3, 2, 2)), strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("backend", ON_CPU)
def test_views_with_strides_are_taken(backend):
    x, weight, bias = inputs([6, 5])
    with forced(backend):
        expected = conv_downsample_gelu(x, cumulative([6, 5]), weight, bias, 6)
        strided = conv_downsample_gelu(x.t().contiguous().t(), cumulative([6, 5]), weight.mT.contiguous().mT, bias, 6)
    assert torch.equal(strided, expected)


@given(lengths)
def test_frames_know_the_outputs_that_read_them(lengths):
    cu_seqlens, rows = cumulative(lengths), conv_rows(lengths)
    read = {
        (frame - 1, tap, o) for o, each in enumerate(downsample_taps(cu_seqlens, rows).tolist()) for tap, frame in enumerate(each)
    }
    back = upsample_taps(cu_seqlens, sum(lengths)).tolist()
    assert {(f, tap, o) for f, each in enumerate(back) for tap, o in enumerate(each) if o >= 0} == {r for r in read if r[0] >= 0}


def test_shapes_that_do_not_fit_are_refused():
    x, weight, bias = inputs([4])
    with pytest.raises(ValueError, match="must be"):
        conv_downsample_gelu(x[:, :5], cumulative([4]), weight, bias, 2)


def test_types_that_do_not_fit_are_refused():
    x, weight, bias = inputs([4])
    with pytest.raises(ValueError, match="one type"):
        conv_downsample_gelu(x, cumulative([4]), weight, bias.bfloat16(), 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(
    ("bounds", "rows", "named"),
    [
        ([0, 7, 11], 5, "rows is 5, but the segments make 6"),
        ([0, 7, 11], 7, "rows is 7"),
        ([0, 7, 10], 6, "rise from 0 to 11"),
        ([0, 7, 13], 7, "rise"),
        ([1, 7, 11], 5, "rise"),
        ([0, 12, 11], 6, "rise"),
    ],
)
def test_bounds_and_rows_that_contradict_each_other_are_refused(backend, tiles, bounds, rows, named):
    x, weight, bias = inputs([7, 4], dtype=torch.bfloat16 if backend == "triton" else torch.float32)
    with forced(backend), by_tiles() if tiles else contextlib.nullcontext(), pytest.raises(ValueError, match=named):
        conv_downsample_gelu(x, torch.tensor(bounds, dtype=torch.int32), weight, bias, rows)


@pytest.mark.parametrize(
    ("op", "shapes", "named"),
    [
        # Segments of 7 and 4 frames: 6 outputs in 3 tiles.
        ("conv_gather", [(11, 2), None, 1, (6, 6)], "6 outputs, not 6 from 1"),
        ("conv_gather", [(11, 2), None, -1, (6, 6)], "6 outputs"),
        ("conv_gather", [(11, 2), None, 0, (7, 4, 2)], "3 tiles"),
        ("conv_gather", [(10, 2), None, 0, (6, 6)], "ends at 11"),
        ("conv_scatter", [(7, 6), None, 0, (11, 2)], "6 outputs"),
        ("conv_scatter", [(6, 6), None, 0, (10, 2)], "ends at 11"),
        ("conv_join_tiles", [(5, 3, 2), None, (2,), 0, (5, 2), (5, 2)], "6 outputs, but there are 5"),
        ("conv_join_tiles", [(5, 3, 2), None, (2,), 0, (7, 2), (7, 2)], "6 outputs, but there are 7"),
        ("conv_join_tiles", [(5, 3, 2), None, (2,), 1, (6, 2), (6, 2)], "3 tiles"),
        ("conv_gradient_tiles", [(5, 2), None, 0, (5, 3, 2)], "6 outputs, but there are 5"),
        ("conv_gradient_tiles", [(6, 2), None, 0, (5, 4, 2)], "3 tiles"),
    ],
)
def test_the_library_writes_nothing_beside_its_tensors(op, shapes, named):
    arguments = [cumulative([7, 4]) if s is None else s if isinstance(s, int) else torch.zeros(s) for s in shapes]
    with pytest.raises(RuntimeError, match=named):
        getattr(native.ops(), op)(*arguments)


@pytest.mark.parametrize("bounds", [[], [1, 11], [0, 12, 11]])
def test_the_library_refuses_bounds_out_of_order(bounds):
    with pytest.raises(RuntimeError, match="cu_seqlens must"):
        native.ops().conv_gather(torch.zeros(11, 2), torch.tensor(bounds, dtype=torch.int32), 0, torch.zeros(1, 6))


@pytest.mark.parametrize("lengths", [[5, 4, 0, 1], []])
def test_registration(lengths):
    x, weight, bias = inputs(lengths)
    arguments = x.requires_grad_(), cumulative(lengths), weight.requires_grad_(), bias.requires_grad_(), conv_rows(lengths), True
    torch.library.opcheck(_op.registered, arguments)
