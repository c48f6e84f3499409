"""The command line: what a user can mend is one line and status 2; commands reach the code that they name."""

import json

import pytest

from step_megatron import cli


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = cli.main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "midtrain", "trainin.steps=3"], "unknown key trainin; did you mean training?"),
        (["train", "midtrain", "--config", "absent.yaml"], "absent.yaml: No such file"),
        (["data", "inspect", "absent.jsonl"], "absent.jsonl"),
        (["data", "from-manifest", "absent.json", "--out", "out.jsonl"], "absent.json: no such manifest"),
        (["eval", "--run", "absent"], "absent"),
        (["report", "--run", "absent"], "absent"),
        (["chat", "--run", "absent", "--text", "hello"], "absent"),
        (["data", "fetch", "--group", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_a_failure_on_another_rank_says_which(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run(capsys, "data", "inspect", "absent.jsonl")[2].startswith("error on rank 3: ")


def test_a_manifest_becomes_conversations(capsys, tmp_path):
    manifest = tmp_path / "calls.json"
    manifest.write_text(json.dumps({"audio_filepath": "one.wav", "duration": 1.0, "text": "hello"}) + "\n")
    status, out, _ = run(capsys, "data", "from-manifest", str(manifest), "--out", str(tmp_path / "calls.jsonl"))
    assert (status, out) == (0, f"{tmp_path / 'calls.jsonl'}: 1 conversations\n")
    assert json.loads((tmp_path / "calls.jsonl").read_text())["id"] == "calls-1"


def test_ctrl_c_is_no_traceback(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_doctor", interrupted)
    assert run(capsys, "doctor")[0] == 130
