"""Conversations: what is written is what is read; every bad line is refused with file, line, field and remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.schema import (
    Audio,
    Conversation,
    ConversationFile,
    SchemaError,
    Text,
    Turn,
    parse_line,
    read_conversations,
    to_record,
    write_conversations,
)

words = st.text(max_size=20)
names = st.text(min_size=1, max_size=8)
heard = st.lists(st.one_of(st.builds(Text, words), st.builds(Audio, names)), min_size=1, max_size=3).map(tuple)
others = st.builds(Turn, st.sampled_from(["system", "human", "function_output", "tool_json_schemas"]), heard)
replies = st.builds(
    Turn,
    st.just("assistant"),
    st.lists(st.builds(Text, words), min_size=1, max_size=2).map(tuple),
    st.one_of(st.none(), words),
    st.sampled_from([True, False, "content"]),
)
conversations = st.builds(
    Conversation,
    names,
    names,
    st.lists(st.one_of(others, replies), min_size=1, max_size=5).map(tuple),
    st.dictionaries(names, st.one_of(words, st.integers(), st.booleans())).filter(
        lambda meta: not meta.keys() & {"task", "answer", "split"}
    ),
)

GOOD = {"id": "a", "source": "s", "turns": [{"role": "human", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@given(conversations)
def test_what_is_written_is_what_is_read(conversation):
    assert parse_line(json.dumps(to_record(conversation)), "x:1") == conversation


def test_random_access_equals_reading_all(tmp_path):
    path = tmp_path / "a.jsonl"
    count = write_conversations(path, [Conversation(str(i), "s", (Turn("human", (Text("é" * i),)),)) for i in range(9)])
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    file = ConversationFile(path)
    assert count == len(file) == 9
    assert [file[i] for i in range(9)] == list(file) == read_conversations(path)
    assert file[7].turns[0].text == "é" * 7


def test_error_of_random_access_names_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": 3}) + "\n")
    with pytest.raises(SchemaError, match=r"a\.jsonl:3: field `id` is a number; write a string"):
        ConversationFile(path)[1]


def changed(**changes) -> dict:
    return {**GOOD, **changes}


def turn(**changes) -> dict:
    return changed(turns=[{"role": "human", "content": "hi", **changes}])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "`conversation` is an empty list"),
        ({"source": "s", "turns": []}, "`conversation.id` is missing"),
        (changed(turn=[]), "`conversation.turn` is not known"),
        (changed(id=""), "`id` is an empty string"),
        (changed(turns=[]), "`turns` is an empty list"),
        (changed(meta=[1]), "`meta` is a list"),
        (changed(meta={"answer": 3}), "`meta.answer` is a number"),
        (changed(meta={"task": ""}), "`meta.task` is an empty string"),
        (changed(meta={"split": "dev"}), "`meta.split` is 'dev'; write one of train, validation, test"),
        (turn(role="user"), r"`turns\[0\].role` is 'user'; write one of system, human"),
        (turn(role=["human"]), r"`turns\[0\].role`"),
        (turn(reasoning="x"), r"`turns\[0\].reasoning` is set on a human turn"),
        (turn(train=True), r"`turns\[0\].train` is set on a human turn"),
        (turn(role="assistant", train="no"), r"`turns\[0\].train` is a string; write true, false or .content."),
        (turn(role="assistant", reasoning=4), r"`turns\[0\].reasoning` is a number"),
        (turn(text="x"), r"`turns\[0\].text` is not known"),
        (turn(content=[]), r"`turns\[0\].content` is an empty list"),
        (turn(content=None), r"`turns\[0\].content` is null"),
        (turn(content=[{"type": "image"}]), r"`turns\[0\].content\[0\].type` is 'image'"),
        (turn(content=[{"type": "text", "text": "a", "audio": "b"}]), r"`turns\[0\].content\[0\].audio` is not known"),
        (turn(content=[{"type": "audio", "audio": ""}]), r"`turns\[0\].content\[0\].audio` is an empty string"),
        (
            turn(role="assistant", content=[{"type": "audio", "audio": "a.wav"}]),
            r"`turns\[0\].content\[0\]` is audio in an assistant",
        ),
        (turn(content="\ud800"), r"`turns\[0\].content` has half of a surrogate pair"),
    ],
)
def test_bad_record_is_refused_by_place_and_field(record, message):
    with pytest.raises(SchemaError, match=r"^data\.jsonl:7: field " + message):
        parse_line(json.dumps(record), "data.jsonl:7")


@pytest.mark.parametrize("line", ["{", "", '{"id": NaN}', b"\xff{}"])
def test_what_is_not_json_is_refused(line):
    with pytest.raises(SchemaError, match=r"^data\.jsonl:7: .*; write"):
        parse_line(line, "data.jsonl:7")


def test_missing_or_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for name in ("missing.jsonl", "empty.jsonl"):
        with pytest.raises(SchemaError, match=name):
            ConversationFile(tmp_path / name)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(SchemaError, match="a.jsonl:2: field `turns"):
        write_conversations(
            path, [Conversation("a", "s", (Turn("human", (Text("x"),)),)), Conversation("b", "s", (Turn("user", ()),))]
        )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
