"""Verifiable rewards: right replies score, wrong, hedging and endless ones do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.rl.verifiable import CHECKS

CHOICES = ("cat", "dog", "guinea pig", "pig")


@pytest.mark.parametrize(
    ("check", "reply", "answer", "score"),
    [
        ("exact", " Italian. ", "italian", 1),
        ("exact", "It is Italian", "Italian", 0),
        ("exact", "", "Italian", 0),
        ("numeric", "It is 1,234.50.", "1234.5", 1),
        ("numeric", "2 + 2 = 4", "4", 1),
        ("numeric", "4 or 5", "4", 0),
        ("numeric", "−3", "-3", 1),
        ("numeric", "3", "-3", 0),
        ("numeric", "3.0000000001", "3", 1),
        ("numeric", "none", "3", 0),
        ("multiple_choice", "B", "dog", 1),
        ("multiple_choice", "(b) dog", "dog", 1),
        ("multiple_choice", "B. the cat", "dog", 0),
        ("multiple_choice", "The dog.", "dog", 1),
        ("multiple_choice", "dog or cat", "dog", 0),
        ("multiple_choice", "It is a guinea pig", "guinea pig", 1),
        ("multiple_choice", "It is a guinea pig", "pig", 0),
        ("multiple_choice", "A cat", "cat", 1),
        ("multiple_choice", "A dog", "cat", 0),
        ("multiple_choice", "E", "cat", 0),
        ("multiple_choice", "dogma", "dog", 0),
        ("word_error_rate", "Hello, there", "hello there", 1),
        ("word_error_rate", "hello", "hello there", 0.5),
        ("word_error_rate", "a b c d e f g", "hello there", 0),
        ("word_error_rate", "", "", 1),
    ],
)
def test_scores(check, reply, answer, score):
    assert CHECKS[check](reply, answer, CHOICES) == score


@pytest.mark.parametrize(("check", "answer"), [("numeric", "many"), ("multiple_choice", "horse")])
def test_an_answer_that_the_check_cannot_use_is_an_error(check, answer):
    with pytest.raises(ValueError, match=answer):
        CHECKS[check]("x", answer, CHOICES)


@given(st.sampled_from(sorted(CHECKS)), st.text(max_size=60))
def test_any_reply_scores_between_nothing_and_one(check, reply):
    assert 0 <= CHECKS[check](reply, {"numeric": "3", "multiple_choice": "cat"}.get(check, "some words"), CHOICES) <= 1
