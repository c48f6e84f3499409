"""A trained run as a judge: it is asked about clips, and an untrained one's failures are counted, not taken for verdicts."""

import json

from step_megatron.cli import main
from step_megatron.data.preferences import Preference, write_preferences
from step_megatron.data.rl_prompts import RLPrompt, write_rl_prompts
from step_megatron.data.schema import Audio, Text, Turn


def test_a_run_is_asked_about_clips_and_what_it_cannot_judge_has_no_reward(trained, tmp_path, capsys):
    def about(clip: str) -> Preference:
        return Preference(clip, "s", (Turn("human", (Audio(clip), Text("How high?"))),), "low", "high", "data")

    records = trained.data / "preferences.jsonl"
    write_preferences(records, [about("0.wav"), about("broken.wav")])
    settings = ["rl.judge.instructions=brief", "rl.judge.max_tokens=4", "rl.judge.retries=1", "rl.judge.failure_limit=1"]
    assert (
        main(
            [
                "judge",
                "ask",
                "--preferences",
                str(records),
                "--out",
                str(tmp_path / "j.jsonl"),
                "--run",
                str(trained.run),
                *settings,
            ]
        )
        == 0
    )
    good, broken = map(json.loads, (tmp_path / "j.jsonl").read_text().splitlines())
    assert good["reward"] is None and len(good["failures"]) == 4 and "unanswered" not in good["failures"]
    assert broken["reward"] is None and broken["failures"] == ["unanswered"] * 2
    records.unlink()


def test_a_run_is_no_better_than_itself(trained, tmp_path, capsys):
    check = {"checks": [{"has": ["low"], "form": "sentence"}]}
    prompts = [
        RLPrompt(clip, "s", (Turn("human", (Audio(clip), Text("How high?"))),), answer="low", meta=check)
        for clip in ("0.wav", "1.flac", "broken.wav")
    ]
    records, out = trained.data / "prompts.jsonl", tmp_path / "comparison.json"
    write_rl_prompts(records, prompts)
    runs = ["--run", str(trained.run), "--against", str(trained.run)]
    assert main(["judge", "compare", *runs, "--prompts", str(records), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["win_rate"], found["ties"], found["n"], found["failed"]) == (0.5, 2, 2, 1)
    assert "win rate 0.500" in capsys.readouterr().out
    records.unlink()
