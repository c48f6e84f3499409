"""The reader of verdicts: what is written is read; whatever else a judge or a reply in its mouth may write is a named failure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.preferences import Verdict
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import VerdictError, parse_verdict, write_verdict
from tests.rl.judge.hostile import HOSTILE

SCALE = Scale()
verdicts = st.builds(
    Verdict, st.lists(st.sampled_from(SCALE.values), max_size=4).map(tuple), st.sampled_from(SCALE.values)
).filter(lambda v: not v.rubric or not (max(v.rubric) < 0 < v.overall or v.overall < 0 < min(v.rubric)))


@given(verdicts, st.text(max_size=30).filter(lambda text: "</think>" not in text))
def test_what_is_written_is_read(verdict, thinking):
    for text in (
        f"{thinking}</think>\n{write_verdict(verdict)}",
        f"<think>{thinking}</think>\n\n```json\n{write_verdict(verdict)}\n```\n",
        f"{thinking}</think>{write_verdict(verdict)}<|EOT|><|endoftext|>\n",
    ):
        assert parse_verdict(text, SCALE, len(verdict.rubric)) == verdict


@pytest.mark.parametrize(
    ("text", "criteria", "kind"),
    [
        ("", 0, "unfinished"),
        ('{"rubric": [], "overall": 3}', 0, "unfinished"),
        ('the reply says "</think>" </think>{"rubric": [], "overall": 3}', 0, "ambiguous"),
        ('x</think>{"rubric": [], "overall": 3}</think>{"rubric": [], "overall": -3}', 0, "ambiguous"),
        ("x</think>", 0, "not_json"),
        ("x</think>I prefer the first.", 0, "not_json"),
        ('x</think>The verdict: {"rubric": [], "overall": 3}', 0, "not_json"),
        ('x</think>{"rubric": [], "overall": 3} because it is better', 0, "not_json"),
        ("x</think>{'rubric': [], 'overall': 3}", 0, "not_json"),
        ('x</think>{"rubric": [], "overall": NaN}', 0, "not_json"),
        ('x</think>{"rubric": [], "overall": +3}', 0, "not_json"),
        ("x</think>" + "[" * 5000, 0, "not_json"),
        ("x</think>" + "[" * 200_000, 0, "not_json"),
        ('x</think>{"rubric": [], "overall": ' + "9" * 5000 + "}", 0, "not_json"),
        ('x</think>{"rubric": [], "overall": 3}{"rubric": [], "overall": -3}', 0, "conflicting"),
        ('x</think>{"rubric": [], "overall": 3}\n{"rubric": [], "overall": 3}', 0, "conflicting"),
        ('x</think>{"rubric": [], "overall": 3, "overall": -3}', 0, "conflicting"),
        ('x</think>{"rubric": [2, 1], "overall": -1}', 2, "conflicting"),
        ('x</think>{"rubric": [-2, -1], "overall": 1}', 2, "conflicting"),
        ("x</think>3", 0, "wrong_type"),
        ('x</think>[{"rubric": [], "overall": 3}]', 0, "wrong_type"),
        ('x</think>{"rubric": [], "overall": "3"}', 0, "wrong_type"),
        ('x</think>{"rubric": [], "overall": 3.0}', 0, "wrong_type"),
        ('x</think>{"rubric": [], "overall": true}', 0, "wrong_type"),
        ('x</think>{"rubric": [], "overall": null}', 0, "wrong_type"),
        ('x</think>{"rubric": {}, "overall": 3}', 0, "wrong_type"),
        ('x</think>{"rubric": [], "overall": 3, "winner": 1}', 0, "wrong_type"),
        ('x</think>{"overall": 3}', 0, "missing"),
        ('x</think>{"rubric": []}', 0, "missing"),
        ('x</think>{"rubric": [], "overall": 3}', 2, "missing"),
        ('x</think>{"rubric": [1], "overall": 3}', 0, "missing"),
        ('x</think>{"rubric": [], "overall": 4}', 0, "out_of_range"),
        ('x</think>{"rubric": [1, -9], "overall": 0}', 2, "out_of_range"),
    ],
)
def test_everything_else_is_a_named_failure(text, criteria, kind):
    with pytest.raises(VerdictError) as failure:
        parse_verdict(text, SCALE, criteria)
    assert failure.value.kind == kind


def test_a_scale_without_a_tie_has_none():
    with pytest.raises(VerdictError, match="not one of -3, -2, -1, 1, 2, 3"):
        parse_verdict('</think>{"rubric": [], "overall": 0}', Scale(6), 0)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_judge_that_repeats_a_hostile_reply_gives_it_nothing(name):
    """In its thinking, the reply changes no verdict (or makes the answer fail); in place of the verdict, it is none."""
    reply = HOSTILE[name]
    honest = '{"rubric": [], "overall": -2}'
    if "</think>" in reply:
        with pytest.raises(VerdictError, match="more than one"):
            parse_verdict(f"It says: {reply}. Bad.</think>{honest}", SCALE, 0)
    else:
        assert parse_verdict(f"It says: {reply}. Bad.</think>{honest}", SCALE, 0).overall == -2
    for answer in (f"{honest} {reply}", f"{reply} {honest}"):
        if reply.strip():
            with pytest.raises(VerdictError):
                parse_verdict(f"Bad.</think>{answer}", SCALE, 0)


@given(st.text(alphabet='{}[]":,0123 -rubicoveal<>/think`\n', max_size=80), st.integers(0, 2))
def test_no_text_breaks_the_reader(text, criteria):
    try:
        verdict = parse_verdict(text, SCALE, criteria)
    except VerdictError:
        return
    assert verdict.overall in SCALE.values
