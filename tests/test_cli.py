"""The command line: what a user can mend is one line and status 2; commands reach the code that they name."""

import json
import sys

import numpy as np
import pytest
import soundfile

from step_megatron import cli
from step_megatron.audio.errors import AudioError, NotIndexed, QuarantineLimitExceeded
from step_megatron.checkpoint.directory import CheckpointError
from step_megatron.data.fetch.mirror import MirrorError
from step_megatron.data.recipes.espeak import EspeakError


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
    monkeypatch.setenv("STEP_DATA", str(tmp_path / "data"))
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("arguments", [["data", "inspect", "absent.jsonl"], ["train", "midtrain", "--config", "absent.yaml"]])
def test_a_failure_on_another_rank_says_which(arguments, capsys, monkeypatch, tmp_path):
    """Also of the configuration: the recipe may be missing on one node."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("error on rank 3: ") and "absent" in err


def test_a_dead_mirror_is_no_traceback(capsys, monkeypatch, tmp_path):
    """The connection is refused at once: nothing listens on port 9."""
    monkeypatch.setenv("STEP_DEBIAN_MIRROR", "http://127.0.0.1:9/debian")
    monkeypatch.setattr("step_megatron.data.fetch.download.time.sleep", lambda seconds: None)
    status, out, err = run(capsys, "data", "fetch", "--data", str(tmp_path), "--group", "gcin")
    assert status == 2 and out == "" and "\nerror: could not download" in err and "STEP_DEBIAN_MIRROR" in err


def test_too_many_bad_clips_are_no_traceback(capsys, monkeypatch, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    line = {"id": "a", "source": "s", "turns": [{"role": "human", "content": [{"type": "audio", "audio": "bad.wav"}]}]}
    line["turns"].append({"role": "assistant", "content": "yes"})
    (tmp_path / "all.jsonl").write_text(json.dumps(line) + "\n")
    status, _, err = run(capsys, "data", "validate", str(tmp_path / "all.jsonl"))
    assert status == 2 and "error: 1 of 1 clips (100.0%) are unusable" in err and "bad.wav" in err
    monkeypatch.setenv("STEP_TRACEBACK", "1")
    with pytest.raises(QuarantineLimitExceeded):
        cli.main(["data", "validate", str(tmp_path / "all.jsonl")])


def test_validate_takes_the_longest_clip(capsys, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(24000) / 10), 16000)
    line = {"id": "a", "source": "s", "turns": [{"role": "human", "content": [{"type": "audio", "audio": "a.wav"}]}]}
    (tmp_path / "all.jsonl").write_text(json.dumps(line) + "\n")
    status, _, err = run(capsys, "data", "validate", str(tmp_path / "all.jsonl"), "--max-seconds", "1")
    assert status == 2 and "too-long: 1.5 s; the limit is 1 s" in err
    assert run(capsys, "data", "validate", str(tmp_path / "all.jsonl"), "--max-seconds", "2")[0] == 0


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("step_00000001: does not fit this model"),
        AudioError("truncated", "a.wav ends early"),
        NotIndexed("a.wav is not in the audio index"),
        EspeakError("espeak-ng has no voice"),
        MirrorError("no Debian mirror is known"),
    ],
)
def test_what_a_user_can_mend_is_no_traceback(error, capsys, monkeypatch):
    def broken(options):
        raise error

    monkeypatch.setattr(cli, "_doctor", broken)
    assert run(capsys, "doctor") == (2, "", f"error: {error}\n")
    assert not str(error).startswith("'")


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(options):
        raise KeyError("a dictionary of the program's own")

    monkeypatch.setattr(cli, "_doctor", broken)
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_bench_without_its_peer_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run(capsys, "bench", "front-end")
    assert status == 2 and err.startswith("error: ") and "pip install" in err and "[dev]" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encoder", "--choose"), "bench encoder: has no --choose; that is of pool-norm-downsample"),
        (("encoder", "--device", "cpu"), "bench encoder: has no --device"),
        (("shares", "--out", "x"), "bench shares: has no --out"),
        (("audio-attention", "--choose", "--out", "x"), "STEP_KERNELS_CHOICES names another, not --out"),
    ],
)
def test_bench_refuses_options_that_it_would_not_follow(capsys, arguments, message):
    status, _, err = run(capsys, "bench", *arguments)
    assert status == 2 and message in err


@pytest.mark.parametrize(("flags", "function"), [((), "run"), (("--choose",), "choose")])
def test_bench_passes_the_device_of_an_op_on(monkeypatch, capsys, flags, function):
    import step_kernels.bench

    asked = []
    monkeypatch.setattr(step_kernels.bench, function, lambda *given: asked.append(given))
    assert run(capsys, "bench", "gae", "--device", "meta", *flags)[0] == 0
    assert asked[0][-1] == "meta"


def test_bench_offers_every_op_that_has_cases():
    from step_kernels.bench import OPS

    from step_megatron.commands import bench

    assert bench.BENCHED_OPS == tuple(OPS)


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
