"""Preference records: what is written is read; every bad line is refused with file, line, field and remedy."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.audio.address import parse_address
from step_megatron.data.preferences import (
    Preference,
    Verdict,
    moved,
    parse_preference,
    preference_record,
    read_preferences,
    write_preferences,
)
from step_megatron.data.schema import Audio, SchemaError, Text, Turn

HISTORY = (Turn("human", (Audio("a.wav"), Text("Language?"))), Turn("assistant", (Text("Italian"),), reasoning="soft"))
GOOD = {
    "id": "p", "source": "s", "history": [{"role": "human", "content": "hi"}], "response": "a", "reference": "b",
    "reference_from": "data", "rubric": ["Is polite."], "verdict": {"rubric": [1], "overall": 2}, "reasoning": "{response} is.",
}  # fmt: skip
levels = st.integers(-3, 3)


@st.composite
def records(draw):
    rubric = tuple(draw(st.lists(st.text(min_size=1, max_size=5), max_size=2)))
    verdict = draw(st.none() | st.builds(Verdict, st.tuples(*[levels] * len(rubric)), levels))
    reasoning = draw(st.none() | st.text(st.characters(exclude_categories=["Cs", "N"]), min_size=1))
    replies = draw(st.text(max_size=9)), draw(st.text(max_size=9))
    return Preference("p", "s", HISTORY, *replies, draw(st.sampled_from(["data", "sft"])), rubric, verdict, reasoning)


@given(records())
def test_what_is_written_is_read(preference):
    assert parse_preference(json.dumps(preference_record(preference)), "x:1") == preference


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "`id` is an empty string"),
        ({"history": []}, "`history` is an empty list"),
        ({"history": [{"role": "user", "content": "x"}]}, r"`history\[0\].role` is 'user'; write one of"),
        ({"response": None}, "`response` is null; write a string"),
        ({"reference_from": "model"}, "`reference_from` is 'model'; write one of data, sft"),
        ({"rubric": []}, "`rubric` is an empty list; write a list of criteria, or leave it out"),
        ({"rubric": [""]}, r"`rubric\[0\]` is an empty string"),
        ({"verdict": 3}, "`verdict` is a number"),
        ({"verdict": {"rubric": [1]}}, "`verdict.overall` is missing"),
        ({"verdict": {"overall": 3}}, "`verdict.rubric` does not fit 1 criteria"),
        ({"verdict": {"rubric": [1, 2], "overall": 3}}, "`verdict.rubric` does not fit 1 criteria"),
        ({"verdict": {"rubric": [1], "overall": 3.0}}, "`verdict.overall` is a number, 3.0; write a whole number"),
        ({"verdict": {"rubric": [True], "overall": 3}}, r"`verdict.rubric\[0\]` is a boolean"),
        ({"reasoning": ""}, "`reasoning` is an empty string"),
        ({"reasoning": "x </think> y"}, "`reasoning` holds </think>"),
        ({"reasoning": "Reply 1 is better."}, r"`reasoning` numbers the replies; write \{response\}"),
        ({"meta": {"split": "dev"}}, "`meta.split` is 'dev'"),
        ({"score": 1}, "`preference.score` is not known"),
    ],
)
def test_a_bad_record_is_refused_by_place_and_field(changes, message):
    with pytest.raises(SchemaError, match=r"^data\.jsonl:7: field " + message):
        parse_preference(json.dumps({**GOOD, **changes}), "data.jsonl:7")


def test_a_missing_field_is_named():
    for name in ("id", "source", "history", "response", "reference", "reference_from"):
        with pytest.raises(SchemaError, match=rf"field `preference.{name}` is missing"):
            parse_preference(json.dumps({key: value for key, value in GOOD.items() if key != name}), "x:1")


def test_files_are_read_whole_and_ids_are_unique(tmp_path):
    path = tmp_path / "p.jsonl"
    preferences = [Preference(f"p{i}", "s", HISTORY, "a", "b", "sft") for i in range(3)]
    assert write_preferences(path, preferences) == 3 and read_preferences(path) == preferences
    path.write_text("\n" + path.read_text() + json.dumps(GOOD | {"id": "p1"}))
    with pytest.raises(SchemaError, match=r"p\.jsonl:5: field `id` is 'p1', as in line 3"):
        read_preferences(path)
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(SchemaError, match=name):
            read_preferences(tmp_path / name)


@pytest.mark.parametrize("address", ["a.wav", "sub/t.tar::m.wav", "../x.bin@0+9", "/abs/a.wav"])
def test_moved_turns_name_the_same_clips(tmp_path, address):
    source, target = tmp_path / "one/two", tmp_path / "three"
    turns = (Turn("human", (Audio(address), Text("x"))),)
    (item, text), *_ = [turn.content for turn in moved(turns, source, target)]
    assert parse_address(item.address, target) == parse_address(address, source) and text == Text("x")
    assert moved(turns, Path(tmp_path), Path(tmp_path)) == turns
