"""draw_tokens: the id at which the cumulative probability passes the number, in float64; log-probabilities; registration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import draw_tokens
from step_kernels.draw_tokens import _op, uniform
from support.kernel_checks import backends_here, forced

BACKENDS = backends_here("draw_tokens")


def inputs(rows: int, width: int, spread: float = 4.0, temperature: float = 0.8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    logits = spread * torch.randn(rows, width, generator=generator)
    counter = torch.arange(rows)
    return [logits, torch.full((rows,), temperature), counter * 977, counter % 5, torch.full((rows,), -1)]


def test_it_has_a_fast_backend_here():
    assert "cpp" in BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    rows=st.sampled_from([0, 1, 7, 40]),
    width=st.sampled_from([1, 2, 15, 255, 256, 257, 1000]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.sampled_from([0.1, 1.0, 1.7]),
)
def test_draws_where_the_cumulative_probability_passes_the_number(backend, rows, width, spread, temperature):
    arguments = inputs(rows, width, spread, temperature)
    with forced(backend):
        tokens, logprobs = draw_tokens(*arguments)
    policy = arguments[0].double() / arguments[1].double()[:, None]
    cumulative = policy.softmax(-1).cumsum(-1)
    numbers = uniform(*arguments[2:4]).double()[:, None]
    at = tokens[:, None]
    # Within rounding of sums in float32.
    assert (cumulative.gather(1, at) > numbers - 2e-6).all()
    before = cumulative.gather(1, (at - 1).clamp(min=0)).where(at > 0, 0.0)
    assert (before <= numbers + 2e-6).all()
    # Two large numbers are taken from each other: what counts is the size of the logits.
    largest = 1 + float(policy.abs().max()) if rows else 1.0
    torch.testing.assert_close(logprobs.double(), policy.log_softmax(-1).gather(1, at)[:, 0], rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 33, 4096])
def test_temperature_zero_takes_the_first_likeliest_at_temperature_one(backend, width):
    logits, temperature, *settings = inputs(20, width)
    logits[3, width // 2 :] = logits[3].max() + 1
    with forced(backend):
        tokens, logprobs = draw_tokens(logits, torch.zeros(20), *settings, False)
        temperature[::2] = 0
        mixed, _ = draw_tokens(logits, temperature, *settings)
    assert torch.equal(tokens[:3], logits[:3].argmax(-1)) and tokens[3] == width // 2
    assert torch.equal(mixed[::2], tokens[::2])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_itself_alone(backend):
    arguments = inputs(31, 700)
    with forced(backend):
        everything = draw_tokens(*arguments)
        some = draw_tokens(*(each[5:9].contiguous() for each in arguments))
    for part, whole in zip(some, everything, strict=True):
        assert torch.equal(part, whole[5:9])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_come_is_not_drawn(backend):
    logits, *settings = inputs(500, 600, spread=1.0)
    logits[:, 100:] = -torch.inf
    logits[:, 7] = -torch.inf
    with forced(backend):
        tokens, _ = draw_tokens(logits, *settings)
    assert ((tokens < 100) & (tokens != 7)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_tokens_come_with_their_own_log_probability(backend):
    logits, temperature, seeds, draws, forced_tokens = inputs(4, 50, temperature=1.0)
    forced_tokens[1], forced_tokens[2] = 49, 0
    with forced(backend):
        tokens, logprobs = draw_tokens(logits, temperature, seeds, draws, forced_tokens)
    assert tokens[1:3].tolist() == [49, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_not_numbers_are_seen(backend):
    logits, *settings = inputs(3, 20)
    logits[1, 4] = torch.nan
    with forced(backend):
        _, logprobs = draw_tokens(logits, *settings)
    assert logprobs.isnan().tolist() == [False, True, False]


def test_settings_that_are_missing_are_named():
    arguments = inputs(3, 20)
    arguments[2] = arguments[2][:2]
    with pytest.raises(ValueError, match=r"seeds \(2,\) must be \[3\]"):
        draw_tokens(*arguments)
    with pytest.raises(ValueError, match="must be .rows, vocabulary."):
        draw_tokens(torch.zeros(3, 0), *arguments[1:])


@pytest.mark.parametrize("rows", [5, 0])
def test_is_registered_correctly(rows):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_op.registered, tuple(inputs(rows, 32)), test_utils=checks)
