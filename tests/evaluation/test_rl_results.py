"""What later stages left is added to results and report, and what they did not leave is asked for by name."""

import json

import pytest
from evaluation.test_report import Page

from step_megatron.cli import main
from step_megatron.evaluation.files import write_json, write_jsonl
from step_megatron.evaluation.results import build_results

PART = {"accuracy": 0.7, "interval": [0.6, 0.8], "n": 100, "length_only": 0.55}
CALIBRATION = {
    "all": PART, "plain": {**PART, "accuracy": 0.8}, "rubric": None, "order_disagreement": 0.2, "failed": 3, "records": 120,
    "confusion": {"-1": {"-1": 5, "1": 1, "failed": 2}, "1": {"-1": 0, "1": 7, "failed": 1}}, "mean_level_error": 0.5,
}  # fmt: skip
SIDE = {"right": 0.5, "form": 0.25, "words": 2.0}
COMPARISON = {
    "run": "ppo", "against": "sft", "win_rate": 0.75, "interval": [0.6, 0.85], "wins": 60, "ties": 30, "losses": 10, "n": 100,
    "failed": 0, "before": SIDE, "after": {**SIDE, "form": 1.0},
    "examples": [{"task": "tone", "audio": [], "question": "?", "answer": "1", "before": "<i>", "after": "", "reward": -1.0}],
}  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    run, reward, ppo = (tmp_path / name for name in ("run", "run/reward", "run/ppo"))
    write_json(run / "results.json", build_results([], {}, {"evaluate": 9.0}))
    (run / "seconds.sft").write_text("58")
    write_json(reward / "calibration.json", CALIBRATION)
    write_jsonl(reward / "metrics.jsonl", [{"step": s, "loss": 1 / s} for s in range(1, 9)])
    write_json(ppo / "comparison.json", COMPARISON)
    rows = [
        {"step": s, "score": 0.0, "reward/preference": s / 20, "reward/preference_failed": 0.0,
         "reward/rubric": 3 * s / 20 if s % 2 else "nan", "kl": s / 5, "entropy": 1.0,
         "response_tokens": 20.0, "rollout/dlogp_max": 1e-6 * (10 - s), "rollout/dlogp_mean": 1e-7}
        for s in range(1, 10)
    ]  # fmt: skip
    write_jsonl(ppo / "metrics.jsonl", rows)
    return run, reward, ppo


def test_results_gain_the_later_stages(runs, capsys):
    run, reward, ppo = runs
    command = ["report", "--run", str(run), "--data", str(run), "--reward", str(reward), "--ppo", str(ppo)]
    assert main(command) == 0 and main(command) == 0
    results = json.loads((run / "results.json").read_text())
    judge, policy = results["reward_model"], results["ppo"]
    assert (judge["accuracy"], judge["length_only"], judge["order_disagreement"], judge["rubric"]) == (0.7, 0.55, 0.2, None)
    assert policy["reward_before"] == pytest.approx((1 / 10 + 2 / 20 + 3 / 10) / 3)
    assert policy["reward_after"] == pytest.approx((7 / 10 + 8 / 20 + 9 / 10) / 3)
    assert policy["win_rate"] == 0.75 and policy["kl"] == pytest.approx(1.8) and policy["max_abs_dlogp"] == pytest.approx(9e-6)
    assert results["seconds"] == {"evaluate": 9.0, "sft": 58.0}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("results: ") and "reward model 0.70 (length alone 0.55" in last and "win rate 0.75" in last


def test_the_report_shows_the_later_stages(runs):
    run, reward, ppo = runs
    assert main(["report", "--run", str(run), "--data", str(run), "--reward", str(reward), "--ppo", str(ppo)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    for shown in (
        "Reward by kind",
        "KL from the SFT model",
        "Entropy",
        "Reply length",
        "rollout and trainer",
        "Win rate against SFT",
    ):
        assert shown in page.text
    assert "length alone" in page.text and "known \\ given" in page.text and "<i>" in page.text and "before wins" in page.text
    assert "preference_failed" not in text and not page.addresses


def test_a_stage_that_left_nothing_is_named(runs, capsys):
    run, reward, _ = runs
    (reward / "calibration.json").unlink()
    assert main(["report", "--run", str(run), "--data", str(run), "--reward", str(reward)]) == 2
    assert "judge calibrate --out" in capsys.readouterr().err
