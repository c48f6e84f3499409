"""The report on data files: sums by hand, and what is in two splits at once."""

import json
from types import SimpleNamespace

import pytest

from step_megatron.data.inspect import inspect_files, table
from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations
from step_megatron.data.template import render


def clip(name: str, address: str, text: str, **meta) -> Conversation:
    return Conversation(
        name,
        "corpus",
        (Turn("human", (Audio(address),)), Turn("assistant", (Text(text),))),
        {"task": "transcription", "answer": text, **meta},
    )


def ask(name: str, text: str, **meta) -> Conversation:
    return Conversation(name, "sums", (Turn("human", (Text(text),)), Turn("assistant", (Text("4"),))), meta)


@pytest.fixture
def files(tmp_path):
    tag = {"aspect": "continuity", "aspect_kind": "context"}
    train = [
        clip("a", "a.wav", "Hello, there!", **tag),
        clip("b", "b.wav", "good bye", texts=["New!", 7]),
        ask("t", "2 + 2?", task="sum"),
    ]
    test = [
        clip("c", "c.wav", "hello there", split="test"),
        clip("d", "d.wav", "new", split="validation"),
        ask("t", "2  +\n2?", task="sum"),
        ask("minus", "2 - 2?", task="sum"),
        ask("u", "3 + 1?", task="sum"),
    ]
    write_conversations(tmp_path / "train.jsonl", train)
    write_conversations(tmp_path / "test.jsonl", test)
    index = {
        name: SimpleNamespace(num_samples=samples, sha256=digest)
        for name, samples, digest in (("a.wav", 16000, "1"), ("b.wav", 32000, "2"), ("c.wav", 800000, "2"))
    }
    return SimpleNamespace(paths=[tmp_path / "train.jsonl", tmp_path / "test.jsonl"], index=index, train=train, test=test)


def test_counts_are_the_sums_of_the_conversations(files, compact):
    report = inspect_files(files.paths, compact, files.index)
    rows = {(row["source"], row["task"], row["split"]): row for row in report["rows"]}
    assert list(rows) == [
        ("corpus", "transcription", "train"),
        ("corpus", "transcription", "validation"),
        ("corpus", "transcription", "test"),
        ("sums", "sum", "train"),
        ("sums", "sum", "test"),
    ]
    heard = rows["corpus", "transcription", "train"]
    # One second is 100 mel frames, 25 encoder frames, 13 placeholders; two seconds 25.
    samples = [render(c, compact, {"a.wav": [13], "b.wav": [25]}.__getitem__) for c in files.train[:2]]
    assert heard["conversations"] == 2 and heard["turns"] == 4 and heard["clips"] == 2 and heard["audio_seconds"] == 3
    assert heard["tokens"] == sum(len(sample.input_ids) for sample in samples)
    assert heard["trained_tokens"] == sum(sample.trained_tokens for sample in samples)
    assert rows["corpus", "transcription", "validation"]["not_indexed"] == 1
    assert report["total"]["conversations"] == 8 and report["total"]["audio_seconds"] == 53
    assert report["aspects"]["continuity"] == report["aspects"]["continuity.context"]
    assert report["aspects"]["continuity"]["trained_tokens"] == samples[0].trained_tokens
    assert list(report["aspects"]) == ["continuity", "continuity.context"]
    assert json.loads(json.dumps(report)) == report


def test_what_is_in_two_splits_is_found(files, compact):
    found = inspect_files(files.paths, compact, files.index)["duplicates"]
    assert found == {
        "ids": ["t"],
        "clips": ["2 (test, train)"],
        "transcripts": ["hello there (test, train)", "new (train, validation)"],
        "questions": ["2 + 2? (test, train)"],
    }
    lone = inspect_files(files.paths[:1], compact, files.index)["duplicates"]
    assert not any(lone.values())


def test_without_index_and_tokenizer_the_rest_is_counted(files):
    total = inspect_files(files.paths)["total"]
    assert (total["conversations"], total["clips"], total["audio_seconds"], total["tokens"]) == (8, 4, 0, 0)


def test_table_has_a_line_for_each_row(files, compact):
    report = inspect_files(files.paths, compact, files.index)
    lines = table(report).splitlines()
    assert len(lines) == 2 + 5 + 1 + 2 + 4
    assert lines[0].split()[:4] == ["source", "task", "split", "conversations"]
    assert lines[2].split()[:7] == ["corpus", "transcription", "train", "2", "4", "2", "3"]
    assert lines[7].startswith("total") and lines[10] == "ids used twice: 1, such as t"
    assert lines[8].startswith("aspect continuity: 1 conversations of 2.0 turns, ")
    assert len({len(line) for line in lines[:8]}) == 1, "columns are aligned"
