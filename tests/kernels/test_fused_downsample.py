"""fused_downsample: equals its definition and the two ops that it joins, by every backend; gradients; faults are noticed."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import conv_downsample_gelu, conv_products, fused_downsample, native, pool_norm_downsample, registry
from step_kernels.fused_downsample import _op, feature_starts, fused_downsample_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced, threads
from support.triton_faults import with_fault

EPS = 1e-5
BACKENDS = backends_here("fused_downsample")
ON_CPU = [backend for backend in BACKENDS if backend != "triton"]
lengths = st.lists(st.integers(0, 13) | st.just(301), max_size=6)
# Odd ones at 50 and at 25 Hz, one too short for a frame, and more than a tile of outputs.
SEGMENTS = [7, 0, 1, 22, 5]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(lengths: list[int], width: int = 24, out: int = 10, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """hidden, norm weight, norm bias, weight, bias"""
    hidden = 3 * random(sum(lengths), width) + 1
    rest = (
        1 + random(width, seed=1),
        random(width, seed=2),
        random(out, width, 3, seed=3) * (3 * width) ** -0.5,
        random(out, seed=4),
    )
    return [each.to(dtype) for each in (hidden, *rest)]


def counts(lengths: list[int]) -> tuple[int, int]:
    """Frames at 25 Hz, and outputs."""
    return sum(length // 2 for length in lengths), sum((length // 2 + 1) // 2 for length in lengths)


def run(function, backend, lengths, arguments, dtype, stored) -> list[torch.Tensor]:
    """Result and gradients of the convolution's weight and bias."""
    hidden, norm_weight, norm_bias, weight, bias = (each.detach().to(dtype) for each in arguments)
    weight.requires_grad_(), bias.requires_grad_()
    more = () if function is fused_downsample_reference else counts(lengths)
    with forced(backend):
        out = function(hidden, cumulative(lengths), norm_weight, norm_bias, EPS, weight, bias, *more, stored)
    # Backward is the convolution's, whose Triton kernels are for 16-bit types.
    with forced("torch" if dtype == torch.float32 and backend == "triton" else backend):
        out.backward(random(*out.shape, seed=5).to(dtype))
    return [out.detach(), weight.grad, bias.grad]


def two_ops(hidden, cu_seqlens, norm_weight, norm_bias, eps, weight, bias, frames, rows, stored=torch.bfloat16):
    features = pool_norm_downsample(hidden, cu_seqlens, norm_weight, norm_bias, eps, frames).to(stored)
    return conv_downsample_gelu(features, feature_starts(cu_seqlens), weight, bias, rows)


def check(backend: str, dtype: torch.dtype, lengths: list[int], width: int, out: int) -> None:
    """Hold a backend against the definition, with features that nothing rounds: rounding would hide or magnify differences."""
    arguments = inputs(lengths, width, out, dtype)
    actual = run(fused_downsample, backend, lengths, arguments, dtype, dtype)
    wide = torch.float64
    exact = run(fused_downsample_reference, "torch", lengths, arguments, wide, wide) if counts(lengths)[1] else actual
    plain = run(two_ops, "torch", lengths, arguments, dtype, dtype)
    for values in zip(actual, exact, plain, strict=True):
        assert_as_good_as_plain(*values)


def by_tiles(always: bool):
    """The C++ backend's products by tiles, which otherwise pay for many rows only."""
    if not always:
        return contextlib.nullcontext()
    return mock.patch.multiple(conv_products, _FORWARD_ROWS=-(10**6), _GRADIENT_ROWS=-(10**6), _BLOCK_TILES=5)


def test_it_has_its_fast_backends_here():
    assert {"cpp", "triton"} <= set(BACKENDS)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("tiles", [False, True])
@settings(max_examples=25)
@given(lengths=lengths, width=st.sampled_from([1, 12, 40, 130]), out=st.sampled_from([1, 7, 64]))
def test_equals_its_definition_in_float64(backend, tiles, lengths, width, out):
    with by_tiles(tiles):
        check(backend, torch.float32, lengths, width, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lengths", "width", "out"), [(SEGMENTS, 24, 10), ([140, 3, 203], 80, 130), ([1], 24, 10), ([], 24, 10)])
def test_triton_equals_its_definition(dtype, lengths, width, out):
    check("triton", dtype, lengths, width, out)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("width", [40, 130])
def test_cpp_equals_the_two_ops_bit_for_bit(tiles, width):
    segments = [*SEGMENTS, 301]
    arguments = inputs(segments, width, 33)
    with by_tiles(tiles):
        one, two = (run(each, "cpp", segments, arguments, torch.float32, torch.bfloat16) for each in (fused_downsample, two_ops))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_rounds_features_as_the_two_ops_do(dtype):
    """Features that are rounded otherwise would be off by 2^-9 of their size, far more than another order of sums."""
    arguments = inputs(SEGMENTS, 24, 10, dtype)
    one = run(fused_downsample, "triton", SEGMENTS, arguments, dtype, torch.bfloat16)
    two = run(two_ops, "torch", SEGMENTS, arguments, dtype, torch.bfloat16)
    for a, b in zip(one, two, strict=True):
        assert (a.float() - b.float()).abs().max() < (
            2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        ) * b.abs().max() * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_content_next_door_changes_nothing(backend):
    hidden, *rest = inputs([11, 9, 6])
    changed = hidden.clone()
    changed[11:20] = 1e4
    arguments = *rest[:2], EPS, *rest[2:], *counts([11, 9, 6])
    with forced(backend):
        before, after = (fused_downsample(part, cumulative([11, 9, 6]), *arguments) for part in (hidden, changed))
    assert [torch.equal(a, b) for a, b in zip(before.split((3, 2, 2)), after.split((3, 2, 2)), strict=True)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("tiles", [False, True])
def test_what_is_kept_changes_no_bit_and_threads_change_little(tiles):
    """The library of the products promises no bits across threads."""
    segments, results = [1400, 3, 333], []
    hidden, norm_weight, norm_bias, weight, bias = inputs(segments, 64, 96)
    for count, trained in ((2, False), (2, True), (1, False)):
        norm = norm_weight, norm_bias, EPS
        with threads(count), forced("cpp"), by_tiles(tiles):
            out = fused_downsample(hidden, cumulative(segments), *norm, weight.requires_grad_(trained), bias, *counts(segments))
        results.append(out.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiles", [False, True])
def test_frames_are_made_with_the_same_bits_for_any_threads(tiles):
    segments, results = [1400, 3, 333], []
    hidden, norm_weight, norm_bias, *_ = inputs(segments, 133)
    starts, (frames, rows) = cumulative(segments), counts(segments)
    places = sum(((length // 2 + 1) // 2 + 2) // 3 for length in segments)
    for count in (1, 2):
        kept = torch.full((frames, 133), float("nan"), dtype=torch.bfloat16)
        out = torch.full((7, places, 133) if tiles else (rows, 3 * 133), float("nan"))
        with threads(count):
            native.ops().pool_norm_gather(hidden, starts, norm_weight, norm_bias, EPS, True, kept, feature_starts(starts), 0, out)
        results.append((kept, out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_the_outputs_that_read_it(backend):
    hidden, *rest = inputs([24, 8])
    hidden[6, 3] = float("nan")
    with forced(backend):
        out = fused_downsample(hidden, cumulative([24, 8]), *rest[:2], EPS, *rest[2:], *counts([24, 8]))
    # Frame 3 is the last of output 1 and the first of output 2.
    assert out.isnan().all(1).tolist() == [False, True, True, False, False, False, False, False]


def test_gradients_pass_gradcheck():
    hidden, norm_weight, norm_bias, weight, bias = (each.double() for each in inputs(SEGMENTS, 3, 2))

    def function(weight, bias):
        norm = norm_weight, norm_bias, EPS
        return fused_downsample(hidden, cumulative(SEGMENTS), *norm, weight, bias, *counts(SEGMENTS), torch.float64)

    assert torch.autograd.gradcheck(function, (weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("moment / width", "moment / width"),
        # Only such as read no memory that is not theirs: the interpreter would crash. Which frames there are, and which they are:
        ("row * 3 + tap, mask=row < rows", "row * 3 + 2 - tap, mask=row < rows"),
        ("hidden + place + width, mask", "hidden + place, mask"),
        ("taps + row * 3 + tap, mask=row < rows", "taps + row * 3 + tap, mask=row < rows - 1"),
        ("left = tl.where(inside, feature.to(weight.dtype.element_ty), 0.0)", "left = feature.to(weight.dtype.element_ty)"),
        (
            "centred = tl.where((channel < width)[None, :], pooled - block_mean[:, None], 0.0)",
            "centred = pooled - block_mean[:, None]",
        ),
        ("moment / width", "moment / (width - 1)"),
        ("if KEEP and tap > 0", "if KEEP and tap > 1"),
        ("change * (count / (begin + count))", "change * 0.5"),
    ],
)
def test_a_fault_in_the_kernel_is_noticed(tmp_path, old, new):
    caught = contextlib.nullcontext() if old == new else pytest.raises(AssertionError, match="off by")
    with with_fault(tmp_path, "fused_downsample", "fused_downsample_kernel", old, new), caught:
        check("triton", torch.float32, [140, 7, 3], 80, 10)


@pytest.mark.parametrize("place", range(3))
def test_training_the_encoder_through_it_is_refused(place):
    arguments = inputs([4])
    arguments[place].requires_grad_()
    hidden, norm_weight, norm_bias, weight, bias = arguments
    with pytest.raises(ValueError, match="frozen"):
        fused_downsample(hidden, cumulative([4]), norm_weight, norm_bias, EPS, weight, bias, 2, 1)
    with torch.no_grad():
        fused_downsample(hidden, cumulative([4]), norm_weight, norm_bias, EPS, weight, bias, 2, 1)


@pytest.mark.parametrize(("hidden_type", "stored"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)])
def test_types_that_the_cpp_kernel_does_not_take_go_to_torch(hidden_type, stored):
    hidden, *norm, weight, bias = inputs([9, 6])
    hidden, norm = hidden.to(hidden_type), [each.to(hidden_type) for each in norm]
    before = registry.chosen["fused_downsample", "torch"]
    arguments = cumulative([9, 6]), *norm, EPS, weight, bias
    out = fused_downsample(hidden, *arguments, *counts([9, 6]), stored)
    assert registry.chosen["fused_downsample", "torch"] == before + 1 and out.dtype == torch.float32
    torch.testing.assert_close(out, fused_downsample_reference(hidden, *arguments, stored), rtol=0.02, atol=0.02)


def test_shapes_that_do_not_fit_are_refused():
    hidden, norm_weight, norm_bias, weight, bias = inputs([4])
    for wrong in ((hidden[:, :5], norm_weight, norm_bias, weight), (hidden, norm_weight[:5], norm_bias, weight)):
        with pytest.raises(ValueError, match="fused_downsample"):
            fused_downsample(wrong[0], cumulative([4]), *wrong[1:3], EPS, wrong[3], bias, 2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [1, 2, 4])
def test_types_that_do_not_fit_are_refused(backend, place):
    arguments = inputs([4])
    arguments[place] = arguments[place].bfloat16()
    hidden, norm_weight, norm_bias, weight, bias = arguments
    with forced(backend), pytest.raises(ValueError, match="must be of hidden's type and bias of weight's"):
        fused_downsample(hidden, cumulative([4]), norm_weight, norm_bias, EPS, weight, bias, 2, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("bounds", "frames", "rows", "named"),
    [
        ([0, 9, 15], 6, 4, "frames is 6, but the segments make 7"),
        ([0, 9, 15], 8, 4, "frames is 8"),
        ([0, 9, 15], 7, 3, "rows is 3, but the segments make 4"),
        ([0, 9, 15], 7, 5, "rows is 5"),
        ([0, 9, 17], 8, 4, "rise from 0 to 15"),
        ([0, 17, 15], 7, 4, "rise"),
    ],
)
def test_bounds_and_counts_that_contradict_each_other_are_refused(backend, tiles, trained, bounds, frames, rows, named):
    hidden, norm_weight, norm_bias, weight, bias = inputs([9, 6])
    norm = norm_weight, norm_bias, EPS
    with forced(backend), by_tiles(tiles), pytest.raises(ValueError, match=named):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        fused_downsample(hidden, cu_seqlens, *norm, weight.requires_grad_(trained), bias, frames, rows)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(
    ("hidden", "hidden_starts", "kept", "starts", "outputs", "named"),
    [
        # Segments of 9 and 6 hidden rows: 4 and 3 frames, 2 and 2 outputs.
        (15, [0, 9, 15], 6, [0, 4, 7], 1, "cu_seqlens ends at 7, but there are 6 rows"),
        (15, [0, 9, 15], 8, [0, 4, 7], 1, "there are 8 rows"),
        (14, [0, 9, 15], 7, [0, 4, 7], 1, "hidden_starts ends at 15"),
        (15, [0, 9, 15], 7, [0, 3, 7], 1, "segment 0 must have a frame for every two"),
        (15, [0, 9, 15], 8, [0, 4, 8], 1, "segment 1 must"),
        (15, [0, 9, 15], 7, [0, 4, 7], 5, "the segments have"),
        (15, [0, 9, 15], 0, [0, 4, 7], 5, "the segments have"),
    ],
)
def test_the_library_writes_no_frame_beside_its_tensors(tiles, hidden, hidden_starts, kept, starts, outputs, named):
    bounds = [torch.tensor(each, dtype=torch.int32) for each in (hidden_starts, starts)]
    out, norm = torch.zeros((7, outputs, 2) if tiles else (outputs, 6)), (torch.ones(2), torch.zeros(2), EPS)
    with pytest.raises(RuntimeError, match=named):
        native.ops().pool_norm_gather(
            torch.zeros(hidden, 2), bounds[0], *norm, True, torch.zeros(kept, 2).bfloat16(), bounds[1], 0, out
        )


@pytest.mark.parametrize("lengths", [[5, 4, 0, 1], []])
def test_registration(lengths):
    hidden, norm_weight, norm_bias, weight, bias = inputs(lengths)
    cu_seqlens, norm = cumulative(lengths), (norm_weight, norm_bias, EPS)
    kept = weight.requires_grad_(), bias.requires_grad_(), *counts(lengths), torch.bfloat16, True
    torch.library.opcheck(_op.registered, (hidden, cu_seqlens, feature_starts(cu_seqlens), *norm, *kept))
