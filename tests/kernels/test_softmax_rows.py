"""The passes over rows of logits in Triton, each by itself: right, nothing beside the rows is touched, a fault is noticed.

Barriers are not among the faults: the interpreter runs a program's lanes in step, so it cannot miss one.
"""

import pytest
import torch
from step_kernels import softmax_rows
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced
from support.triton_faults import with_fault

# Two blocks and a column more; the labels: the first column, the last, one of the rank before, one of the rank after.
WIDTH, START = 129, 50
LABELS = torch.tensor([START, START + WIDTH - 1, START - 3, START + WIDTH])
ROWS = len(LABELS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(softmax_rows, "_BLOCK", 64)


def surrounded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of rising logits in the middle of others, which no pass may read or write, and all of them."""
    everything = torch.randn(3 * ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).add_(torch.arange(WIDTH) / 10)
    return everything[ROWS : 2 * ROWS], everything


def per_row(count: int) -> torch.Tensor:
    return torch.randn(count, ROWS, generator=torch.Generator().manual_seed(1))


def assert_alone(everything: torch.Tensor, seed: int) -> None:
    """Nothing beside the rows has changed."""
    for part in (slice(0, ROWS), slice(2 * ROWS, 3 * ROWS)):
        assert torch.equal(everything[part], surrounded(seed)[1][part]), "a row beside is off by some values"


def statistics() -> None:
    logits, everything = surrounded(0)
    found = torch.empty(4, ROWS)
    softmax_rows.statistics_triton(logits, LABELS, START, True, found)
    exact, plain = (softmax_rows.statistics_torch(logits.to(dtype), LABELS - START) for dtype in (torch.float64, torch.float32))
    for each in zip(found, exact, plain, strict=True):
        assert_as_good_as_plain(*each)
    assert_alone(everything, 0)


def gradient() -> None:
    logits, everything = surrounded(0)
    lse, coefficients = logits.logsumexp(1), per_row(3)
    results = []
    for dtype in (torch.float64, torch.float32):
        results.append(logits.to(dtype).clone())
        softmax_rows.gradient_torch(results[-1], LABELS - START, *(each.to(dtype) for each in (lse, *coefficients)))
    softmax_rows.gradient_triton(logits, LABELS, START, lse, *coefficients)
    assert_as_good_as_plain(logits, *results)
    assert_alone(everything, 0)


def losses() -> None:
    logits, everything = surrounded(0)
    found, (weights,) = torch.empty(ROWS), per_row(1)
    results = []
    for dtype in (torch.float64, torch.float32):
        values, factor = logits.to(dtype).clone(), weights.to(dtype)
        lse, target = values.logsumexp(1), softmax_rows.statistics_torch(values, LABELS - START)[2]
        softmax_rows.gradient_torch(values, LABELS - START, lse, factor, torch.zeros_like(factor), -factor)
        results.append((lse - target, values))
    softmax_rows.losses_triton(logits, LABELS, weights, found, START, True)
    for each in zip((found, logits), *results, strict=True):
        assert_as_good_as_plain(*each)
    assert_alone(everything, 0)


def scale() -> None:
    rows, everything = surrounded(0)
    exact, plain = 3 * rows.double(), 3 * rows
    softmax_rows.scale_triton(rows, torch.tensor(3.0))
    assert_as_good_as_plain(rows, exact, plain)
    assert_alone(everything, 0)


PASSES = {
    "softmax_statistics_kernel": statistics,
    "softmax_gradient_kernel": gradient,
    "softmax_losses_kernel": losses,
    "scale_kernel": scale,
}
STATISTICS, GRADIENT, LOSSES, SCALE = PASSES


@pytest.mark.parametrize("kernel", PASSES)
def test_a_pass_is_right_and_keeps_to_its_rows(kernel):
    PASSES[kernel]()


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        # A mask is gone: of the columns beyond the row, when read and when written; of the labels of other ranks.
        (STATISTICS, "values = tl.where(columns < width, values, lowest)", "values = values"),
        (GRADIENT, "gradient.to(row.dtype.element_ty), mask=columns < width)", "gradient.to(row.dtype.element_ty))"),
        (SCALE, "scaled.to(values.dtype.element_ty), mask=index < count)", "scaled.to(values.dtype.element_ty))"),
        (STATISTICS, "inside = (target >= 0) & (target < width)\n    tl.store(out", "inside = target >= 0\n    tl.store(out"),
        (LOSSES, "inside = (target >= 0) & (target < width)\n    tl.store(losses", "inside = target > -9\n    tl.store(losses"),
        # A boundary is off by one.
        (STATISTICS, "for begin in range(0, width, BLOCK):\n        columns = begin + tl.arange(0, BLOCK)\n        values",
         "for begin in range(0, width - 1, BLOCK):\n        columns = begin + tl.arange(0, BLOCK)\n        values"),
        (GRADIENT, "tl.where(columns == target,", "tl.where(columns == target + 1,"),
        (LOSSES, "lse - tl.load(row + target,", "lse - tl.load(row + target + 1,"),
        (SCALE, "tl.arange(0, BLOCK)\n        scaled", "tl.arange(0, BLOCK) + 1\n        scaled"),
        # What was summed before is not brought to the new maximum.
        (STATISTICS, "total = total * factor + power", "total = total + power"),
        (STATISTICS, "(moment + total * (before - largest)) * factor", "moment * factor"),
        # A sign, a term.
        (LOSSES, "weight, 0.0, -weight, BLOCK", "weight, 0.0, weight, BLOCK"),
        (GRADIENT, "first + second * log_p if MOMENTS else first", "first"),
    ],
)  # fmt: skip
def test_a_fault_is_noticed(tmp_path, kernel, old, new):
    with with_fault(tmp_path, "softmax_rows", kernel, old, old):
        PASSES[kernel]()
    with with_fault(tmp_path, "softmax_rows", kernel, old, new), pytest.raises(AssertionError, match="off by"):
        PASSES[kernel]()


@pytest.mark.parametrize("backend", backends_here("linear_cross_entropy"))
def test_log_probabilities_of_tokens(backend):
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(7, 101, generator=generator)
    tokens = torch.randint(0, 101, (7,), generator=generator)
    exact, plain = (logits.to(dtype).log_softmax(1).gather(1, tokens[:, None])[:, 0] for dtype in (torch.float64, torch.float32))
    with forced(backend):
        found = softmax_rows.token_log_probs(logits, tokens)
        assert_as_good_as_plain(found, exact, plain)
        assert torch.equal(softmax_rows.token_log_probs(logits[2:4], tokens[2:4]), found[2:4]), "a row's bits are its own"
