"""Files that a kill leaves whole."""

import json

import pytest

from step_megatron.runtime import files
from step_megatron.runtime.files import append_json_line, replace_text


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    path = tmp_path / "deeper" / "lines.jsonl"
    append_json_line(path, {"n": 1})
    append_json_line(path, {"n": "zwei"})
    with path.open("a") as file:
        file.write('{"n": 3, "to')
    append_json_line(path, {"n": 4})
    assert [line for line in path.read_text().splitlines()] == ['{"n": 1}', '{"n": "zwei"}', '{"n": 3, "to', '{"n": 4}']
    assert json.loads(path.read_text().splitlines()[-1]) == {"n": 4}


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    replace_text(path, "old")

    def die(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        replace_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    replace_text(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
