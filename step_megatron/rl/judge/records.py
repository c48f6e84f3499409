"""Judgments as JSONL, so that what a judge said once can be looked at and measured again.

{"id": "p1", "reward": 0.5, "straight": {"rubric": [], "overall": 2}, "swapped": {"rubric": [], "overall": 1},
 "failures": [], "cut": 0}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_megatron.data.preferences import Preference, Verdict
from step_megatron.errors import UserError
from step_megatron.evaluation.files import read_jsonl, write_jsonl
from step_megatron.rl.judge.judging import Judgment
from step_megatron.rl.preference_data import pair_of


class RecordError(UserError, ValueError):
    """A file of judgments that does not fit."""


def write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """Write a file, atomically."""
    write_jsonl(
        path,
        (
            {
                "id": judgment.pair.id,
                "reward": judgment.reward,
                "straight": _record(judgment.straight),
                "swapped": _record(judgment.swapped),
                "failures": list(judgment.failures),
                "cut": judgment.cut,
            }
            for judgment in judgments
        ),
    )


def read_judgments(path: Path, preferences: Sequence[Preference]) -> list[Judgment]:
    """The judgments of these preferences, in their order.

    Raises:
        RecordError: a preference has no judgment in the file, or a line is no judgment.
    """
    try:
        rows = {row["id"]: row for row in read_jsonl(path)}
        if missing := [preference.id for preference in preferences if preference.id not in rows]:
            raise RecordError(
                f"{path}: no judgment of {missing[0]!r} ({len(missing)} are missing); judge this file of preferences"
            )
        return [_judgment(preference, rows[preference.id]) for preference in preferences]
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: a line is no judgment ({error!r}); write the file by `step-megatron judge ask`") from None


def _record(verdict: Verdict | None) -> dict[str, Any] | None:
    return None if verdict is None else {"rubric": list(verdict.rubric), "overall": verdict.overall}


def _judgment(preference: Preference, row: dict[str, Any]) -> Judgment:
    straight, swapped = (
        None if row[name] is None else Verdict(tuple(row[name]["rubric"]), row[name]["overall"])
        for name in ("straight", "swapped")
    )
    return Judgment(pair_of(preference), row["reward"], straight, swapped, tuple(row["failures"]), row["cut"])
