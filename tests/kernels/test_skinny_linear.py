"""skinny_linear: equals float64 for any sizes, with norm and residual; a row keeps its bits among any number of others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import registry, skinny_linear, skinny_linear_add_
from step_kernels.skinny_linear import MOST_ROWS, _add_op, _op, skinny_linear_reference
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced, threads

BACKENDS = backends_here("skinny_linear")


def inputs(rows: int, inner: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * inner + outputs)
    shapes = (rows, inner), (outputs, inner), (outputs,)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.integers(0, MOST_ROWS),
    # Around the depth of a block and the number of weight rows that go together.
    inner=st.sampled_from([16, 32, 368, 384, 400, 784]),
    outputs=st.sampled_from([0, 1, 5, 47, 48, 49, 97]),
    biased=st.booleans(),
)
def test_equals_the_definition_in_float64(backend, rows, inner, outputs, biased):
    x, weight, bias = inputs(rows, inner, outputs)
    given_bias = bias if biased else None
    with forced(backend):
        actual = skinny_linear(x, weight, given_bias)
    exact = skinny_linear_reference(x.double(), weight.double(), bias.double() if biased else None)
    assert_as_good_as_plain(actual, exact, skinny_linear_reference(x, weight, given_bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 7, 33, MOST_ROWS + 1])
def test_the_norm_before_it(backend, rows):
    x, weight, bias = inputs(rows, 400, 49)
    norm = torch.randn(400, generator=torch.Generator().manual_seed(rows))
    with forced(backend):
        actual = skinny_linear(3 * x, weight, bias, norm, 1e-3)
    exact = skinny_linear_reference(3 * x.double(), weight.double(), bias.double(), norm.double(), 1e-3)
    normed = torch.nn.functional.rms_norm(3 * x.double(), (400,), norm.double(), 1e-3)
    torch.testing.assert_close(exact, torch.nn.functional.linear(normed, weight.double(), bias.double()))
    assert_as_good_as_plain(actual, exact, skinny_linear_reference(3 * x, weight, bias, norm, 1e-3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("inner", [16, 25, 784])
def test_the_residual_after_it(backend, rows, inner):
    x, weight, _ = inputs(rows, inner, 50)
    y = torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows))
    actual = y.clone()
    with forced(backend):
        assert skinny_linear_add_(actual, x, weight) is actual
    exact = y.double() + x.double() @ weight.double().T
    assert_as_good_as_plain(actual, exact, y + x @ weight.T)


@given(rows=st.integers(2, MOST_ROWS), start=st.integers(0, MOST_ROWS - 2), count=st.integers(1, 3))
def test_a_row_keeps_its_bits_among_any_others(rows, start, count):
    x, weight, bias = inputs(MOST_ROWS, 400, 97)
    with forced("cpp"):
        everything = skinny_linear(x, weight, bias)
        few = x[start : start + rows]
        assert torch.equal(skinny_linear(few, weight, bias), everything[start : start + rows])
        with threads(count):
            assert torch.equal(skinny_linear(x, weight, bias), everything)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_are_taken(backend):
    x, weight, bias = inputs(9, 64, 24)
    with forced(backend):
        expected = skinny_linear(x, weight, bias)
        strided = skinny_linear(x.repeat(1, 2)[:, :64], weight.repeat(2, 1).view(2, 24, 64)[1], bias)
    torch.testing.assert_close(strided, expected)


def test_many_rows_one_row_and_odd_inner_sizes_go_to_the_library():
    before = registry.chosen.copy()
    with forced("cpp"):
        for rows in (1, MOST_ROWS + 1):
            x, weight, bias = inputs(rows, 32, 8)
            assert torch.equal(skinny_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
        x, weight, bias = inputs(3, 17, 8)
        assert torch.equal(skinny_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    chosen = registry.chosen - before
    assert chosen["skinny_linear", "torch"] == 1 and not chosen["skinny_linear", "cpp"]


def test_values_that_are_not_finite_are_seen():
    x, weight, bias = inputs(4, 32, 50)
    x[2, 5] = torch.nan
    with forced("cpp"):
        out = skinny_linear(x, weight, bias)
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()


def test_sizes_that_do_not_fit_are_named():
    x, weight, bias = inputs(4, 32, 8)
    with pytest.raises(ValueError, match=r"x \(4, 32\) must be"):
        skinny_linear(x, weight[:, :16])
    with pytest.raises(ValueError, match=r"bias \(7,\) must be \[8\]"):
        skinny_linear(x, weight, bias[:7])
    with pytest.raises(ValueError, match=r"y \(4, 7\) must be \[4, 8\]"):
        skinny_linear_add_(torch.zeros(4, 7), x, weight)


@pytest.mark.parametrize("rows", [5, 0])
def test_is_registered_correctly(rows):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, weight, bias = inputs(rows, 32, 8)
    torch.library.opcheck(_op.registered, (x, weight, bias, None, 1e-6), test_utils=checks)
    torch.library.opcheck(_op.registered, (x, weight, None, torch.ones(32), 1e-6), test_utils=checks)
    torch.library.opcheck(_add_op.registered, (torch.zeros(rows, 8), x, weight), test_utils=checks)
