"""Scores equal their definitions: edit distance, error rates, intervals, and what becomes of replies that cannot be read."""

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.evaluation.scoring import (
    edit_distance,
    normalise_label,
    normalise_transcript,
    parse_label,
    score_labels,
    score_transcripts,
    split_reply,
    wilson_interval,
)

words = st.text(alphabet="abc", max_size=8)


def distance_by_definition(a: str, b: str) -> int:
    """The recursive definition, nothing shared with the implementation."""

    @lru_cache(None)
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


@given(words, words)
def test_edit_distance_is_its_definition(a, b):
    assert edit_distance(a, b) == distance_by_definition(a, b) == edit_distance(b, a)


@given(words, words, words)
def test_edit_distance_is_a_metric(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("intention", "execution", 5), ("saturday", "sunday", 3), ("", "abc", 3), ("声调", "声音", 1)],
)
def test_published_edit_distances(a, b, distance):
    assert edit_distance(a, b) == distance


def test_edit_distance_of_words():
    assert edit_distance("the cat sat on the mat".split(), "the cat sat mat".split()) == 2


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Published values: Newcombe 1998 (Statistics in Medicine 17, p. 861), method 3, and the closed form at the ends.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_wilson_interval_published_values(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(pair):
    correct, n = pair
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= (correct / n if n else 0.5) <= high <= 1


def test_wilson_interval_refuses_more_right_than_counted():
    with pytest.raises(ValueError, match="5 of 4"):
        wilson_interval(5, 4)


def test_reply_is_taken_apart_at_the_end_of_thinking():
    reply = split_reply("1.2 s of speech.\n</think>\nItalian<|EOT|>")
    assert (reply.reasoning, reply.answer) == ("1.2 s of speech.", "Italian")
    assert split_reply("\n</think>\nItalian").reasoning == ""
    assert split_reply("<think>\nshort\n</think>\n\nyes<|im_end|>") == split_reply("short</think>yes")


@pytest.mark.parametrize("text", ["Italian", "reasons without end<|EOT|>", "reasons</think>", "reasons</think>\n<|EOT|>", ""])
def test_reply_without_an_answer(text):
    assert split_reply(text).answer is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Italian. ", "italian"),
        ("«Straße»", "strasse"),
        ("speaking\n rate", "speaking rate"),
        ("-5.", "-5"),
        ("(5)", "5"),
        ("...", ""),
    ],
)
def test_labels_are_normalised(text, label):
    assert normalise_label(text) == label


@given(st.text(max_size=12))
def test_normalising_twice_is_normalising_once(text):
    assert normalise_label(normalise_label(text)) == normalise_label(text)
    assert normalise_transcript(normalise_transcript(text)) == normalise_transcript(text)


def test_transcripts_are_normalised():
    assert normalise_transcript("  Don't   STOP—now, perché? ") == "dont stop now perché"


def test_label_outside_the_set_is_unparsable():
    assert parse_label("x</think>Italian!", {"italian", "french"}) == "italian"
    assert parse_label("x</think>It is Italian", {"italian", "french"}) is None
    assert parse_label("x</think>It is Italian", None) == "it is italian"


def test_counts_of_right_wrong_unparsable_and_failed():
    answers = ["Italian", "French", "French", "Italian", "Russian", "Italian"]
    replies = ["</think>italian.", "</think>Italian", "</think>no idea", "never ends", None, "</think>Italian"]
    score = score_labels(answers, replies, ["Italian", "French", "Russian"])
    assert (score.attempted, score.scored, score.failed, score.correct, score.unparsable) == (6, 5, 1, 2, 2)
    assert score.accuracy == 2 / 5
    assert score_labels([], [], None).accuracy is None


def test_error_rates_by_hand():
    # "ab cd" against "ab xd": one of five characters, one of two words. "abc" against nothing: three of three, one of one.
    scores = score_transcripts(["ab cd", "abc", "kept out"], ["r</think>Ab, xd!", "no end", None])
    assert scores == {
        "cer": 4 / 8,
        "wer": 2 / 3,
        "n": 2,
        "attempted": 3,
        "scored": 2,
        "failed": 1,
        "unparsable": 1,
    }


@given(st.lists(st.text(alphabet="ab c", min_size=1, max_size=10), min_size=1, max_size=4))
def test_perfect_transcripts_have_no_errors(references):
    scores = score_transcripts(references, [f"</think>{text}" for text in references])
    assert scores["cer"] in (0, None) and scores["wer"] in (0, None)


def test_error_rate_can_exceed_one_and_is_unknown_without_reference():
    assert score_transcripts(["a"], ["</think>bcd"])["cer"] == 3
    assert score_transcripts([], [])["cer"] is None
