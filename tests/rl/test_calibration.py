"""Calibration of judges whose quality is known; judgments survive the way through a file; a run and a server can be asked."""

import json
import random

import pytest

from step_megatron.cli import main
from step_megatron.data.preferences import Preference, Verdict, write_preferences
from step_megatron.data.schema import Text, Turn
from step_megatron.rl.calibration import CalibrationError, calibrate, report
from step_megatron.rl.judge.judging import Judgment
from step_megatron.rl.judge.records import read_judgments, write_judgments
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.preference_data import pair_of

HISTORY = (Turn("human", (Text("Hello?"),)),)


def preference(number: int, overall: int | None, response="long reply", reference="short", rubric=()) -> Preference:
    verdict = None if overall is None else Verdict((overall,) * len(rubric), overall)
    return Preference(f"p{number}", "s", HISTORY, response, reference, "data", rubric, verdict)


def judged(record: Preference, straight: int | None, swapped: int | None) -> Judgment:
    verdicts = [None if level is None else Verdict((), level) for level in (straight, swapped)]
    reward = None if None in (straight, swapped) else (straight + swapped) / 6
    return Judgment(pair_of(record), reward, *verdicts, () if reward is not None else ("unfinished",))


def test_the_numbers_by_hand():
    records = [
        preference(0, 3), preference(1, -2), preference(2, 0), preference(3, 1, rubric=("c",)), preference(4, 2),
        preference(5, -1, response="same", reference="size"),
    ]  # fmt: skip
    levels = [(3, 2), (1, 1), (0, 0), (1, -1), (None, 2), (-3, -3)]
    found = calibrate(records, [judged(r, *pair) for r, pair in zip(records, levels, strict=True)], Scale())
    # Decided: 0 right, 1 wrong, 3 a tie, 4 failed, 5 right. Longer wins 0, 3, 4, loses 1, and 5 has no longer one.
    assert found["all"]["accuracy"] == 2 / 5 and found["all"]["n"] == 5 and found["all"]["length_only"] == 3.5 / 5
    assert found["plain"]["accuracy"] == 2 / 4 and found["rubric"]["accuracy"] == 0
    assert found["order_disagreement"] == 1 / 5 and found["failed"] == 1 and found["records"] == 6
    assert found["confusion"]["3"] == {"-3": 0, "-2": 0, "-1": 0, "0": 0, "1": 0, "2": 1, "3": 1, "failed": 0}
    assert found["confusion"]["2"]["failed"] == 1 and found["confusion"]["2"]["2"] == 1
    assert found["mean_level_error"] == pytest.approx((0 + 1 + 3 + 3 + 0 + 0 + 0 + 2 + 0 + 2 + 2) / 11)
    text = report(found)
    assert "all     accuracy 0.400" in text and "length alone 0.700, n 5" in text and "failed: 1 of 6" in text


def test_a_judge_of_length_is_no_better_than_the_baseline_and_a_perfect_one_is():
    rng = random.Random(0)
    records = [preference(i, rng.choice([-3, -1, 1, 3]), "a" * rng.randint(1, 9), "b" * rng.randint(1, 9)) for i in range(200)]
    by_length = []
    for record in records:
        level = 3 * ((len(record.response) > len(record.reference)) - (len(record.response) < len(record.reference)))
        by_length.append(judged(record, level, level))
    found = calibrate(records, by_length, Scale())
    assert found["all"]["accuracy"] <= found["all"]["length_only"] < 0.65
    perfect = calibrate(records, [judged(r, r.verdict.overall, r.verdict.overall) for r in records], Scale())
    assert perfect["all"]["accuracy"] == 1 and perfect["mean_level_error"] == perfect["order_disagreement"] == 0


def test_what_nothing_can_be_measured_on_is_refused():
    with pytest.raises(CalibrationError, match="'p0' has no verdict"):
        calibrate([preference(0, None)], [judged(preference(0, None), 1, 1)], Scale())
    with pytest.raises(CalibrationError, match="no record favours a reply"):
        calibrate([preference(0, 0)], [judged(preference(0, 0), 1, 1)], Scale())


def test_judgments_survive_a_file_and_a_wrong_file_is_refused(tmp_path, capsys):
    records = [preference(0, 3), preference(1, -2)]
    judgments = [judged(records[0], 3, None), judged(records[1], -1, -2)]
    write_preferences(tmp_path / "p.jsonl", records)
    write_judgments(tmp_path / "j.jsonl", judgments)
    assert read_judgments(tmp_path / "j.jsonl", records) == judgments
    assert main(["judge", "calibrate", str(tmp_path / "p.jsonl"), str(tmp_path / "j.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["accuracy"] == 0.5
    (tmp_path / "other.jsonl").write_text('{"id": "p0"}\n')
    for name, message in (("other.jsonl", "no judgment of 'p1'"), ("p.jsonl", "a line is no judgment")):
        assert main(["judge", "calibrate", str(tmp_path / "p.jsonl"), str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_too_many_failed_judgments_are_an_error_and_kept_for_a_look(tmp_path, capsys):
    """A server that nobody runs."""
    write_preferences(tmp_path / "p.jsonl", [preference(0, 3)])
    server = "rl.judge.server={url: 'http://127.0.0.1:9/v1', model: m, retries: 0, timeout_seconds: 5}"
    out = tmp_path / "j.jsonl"
    assert main(["judge", "ask", "--preferences", str(tmp_path / "p.jsonl"), "--out", str(out), server]) == 2
    assert "1 of 1 judgments failed" in capsys.readouterr().err
    assert json.loads(out.read_text())["failures"] == ["unanswered"] * 2
