"""Prompts of PPO: what is written is read; every bad line is refused with file, line, field and remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.rl_prompts import CHECKS, RLPrompt, parse_rl_prompt, read_rl_prompts, rl_prompt_record, write_rl_prompts
from step_megatron.data.schema import Audio, SchemaError, Text, Turn
from step_megatron.rl import verifiable

HISTORY = (Turn("human", (Audio("a.wav"), Text("Language?"))),)
GOOD = {"id": "p", "source": "s", "history": [{"role": "human", "content": "hi"}], "reference": "b", "answer": "c"}


@st.composite
def prompts(draw):
    reference, answer = draw(st.none() | st.text(max_size=5)), draw(st.none() | st.text(max_size=5))
    rubric = tuple(draw(st.lists(st.text(min_size=1, max_size=5), max_size=2))) if reference is not None else ()
    check = draw(st.sampled_from(CHECKS)) if answer else "exact"
    choices = (answer, "x") if check == "multiple_choice" else ()
    origin = draw(st.sampled_from(["data", "sft"])) if reference is not None else "data"
    return RLPrompt("p", "s", HISTORY, reference, origin, rubric, answer, check, choices, {"task": "language"})


@given(prompts())
def test_what_is_written_is_read(prompt):
    assert parse_rl_prompt(json.dumps(rl_prompt_record(prompt)), "x:1") == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "`id` is an empty string"),
        ({"history": [{"role": "human", "content": "x"}, {"role": "assistant", "content": "y"}]}, "`history` ends with"),
        ({"reference_from": "model"}, "`reference_from` is 'model'; write one of data, sft"),
        ({"rubric": []}, "`rubric` is an empty list"),
        ({"check": "fuzzy"}, "`check` is 'fuzzy'; write one of exact, numeric"),
        ({"check": "multiple_choice", "choices": ["a"]}, "`choices` has no 'c', the answer"),
        ({"choices": "c"}, "`choices` is a string"),
        ({"answer": 3}, "`answer` is a number"),
        ({"verdict": {}}, "`prompt.verdict` is not known"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(changes, message):
    with pytest.raises(SchemaError, match=rf"x\.jsonl:3: field {message}"):
        parse_rl_prompt(json.dumps(GOOD | changes), "x.jsonl:3")


@pytest.mark.parametrize(("name", "needs"), [("rubric", "reference"), ("choices", "answer"), ("reference_from", "reference")])
def test_what_belongs_to_a_missing_field_is_refused(name, needs):
    record = {"id": "p", "source": "s", "history": GOOD["history"], name: ["x"]}
    with pytest.raises(SchemaError, match=f"`{name}` is set without `{needs}`"):
        parse_rl_prompt(json.dumps(record), "x:1")


def test_a_file_of_prompts_is_read_in_order(tmp_path):
    path = tmp_path / "prompts.jsonl"
    written = [RLPrompt(str(i), "s", HISTORY, answer="x") for i in range(3)]
    assert write_rl_prompts(path, written) == 3
    assert read_rl_prompts(path) == written


def test_every_check_has_its_function():
    assert set(CHECKS) == set(verifiable.CHECKS)
