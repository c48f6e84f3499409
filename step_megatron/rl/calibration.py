"""How good a reward model is, measured on preferences that it was not trained on.

- accuracy: how often its reward and the known verdict favour the same reply, over records that favour one; a tie or a failed
  judgment is wrong. Apart for plain and rubric records, beside a baseline that looks at length alone: the better of "longer wins"
  and "shorter wins" on these very records, which flatters the baseline;
- order disagreement: how often the two orders favour different replies;
- confusion: the known level against the levels that the judge gave, both orders seen from the response.
"""

from collections.abc import Sequence
from typing import Any

from step_megatron.data.preferences import Preference
from step_megatron.errors import UserError
from step_megatron.evaluation.scoring import wilson_interval
from step_megatron.rl.judge.judging import Judgment
from step_megatron.rl.judge.scale import Scale

FAILED = "failed"


class CalibrationError(UserError, ValueError):
    """Preferences that nothing can be measured on."""


def calibrate(preferences: Sequence[Preference], judgments: Sequence[Judgment], scale: Scale) -> dict[str, Any]:
    """Measure judgments, one of each preference and in their order, against the known verdicts.

    Returns:
        `all`, `plain` and `rubric` (None where there are no such records), each with `accuracy`, `interval` (95%, Wilson), `n`,
        `length_only`; `order_disagreement` (None where one order was asked), `failed` and `records`; `confusion`, known level ->
        given level (or `failed`) -> count; `mean_level_error` over the levels given.

    Raises:
        CalibrationError: a record without a verdict, or none that favours a reply.
    """
    if nameless := [preference.id for preference in preferences if preference.verdict is None]:
        raise CalibrationError(f"preference {nameless[0]!r} has no verdict: there is nothing to measure against; label it")
    pairs = list(zip(preferences, judgments, strict=True))
    everything = _accuracy(pairs)
    if everything is None:
        raise CalibrationError("no record favours a reply: accuracy means nothing; add records whose verdict is not a tie")
    known = [judgment.orders_disagree for judgment in judgments if judgment.orders_disagree is not None]
    confusion, errors = _confusion(pairs, scale)
    return {
        "all": everything,
        "plain": _accuracy([(p, j) for p, j in pairs if not p.rubric]),
        "rubric": _accuracy([(p, j) for p, j in pairs if p.rubric]),
        "order_disagreement": sum(known) / len(known) if known else None,
        "failed": sum(judgment.reward is None for judgment in judgments),
        "records": len(pairs),
        "confusion": confusion,
        "mean_level_error": sum(errors) / len(errors) if errors else None,
    }


def report(calibration: dict[str, Any]) -> str:
    """The calibration as text, for a terminal."""
    lines = []
    for name in ("all", "plain", "rubric"):
        if part := calibration[name]:
            low, high = part["interval"]
            shares = f"accuracy {part['accuracy']:.3f} ({low:.3f}-{high:.3f}), length alone {part['length_only']:.3f}"
            lines.append(f"{name:7} {shares}, n {part['n']}")
    disagreement = calibration["order_disagreement"]
    lines.append(f"orders disagree: {'not asked' if disagreement is None else f'{disagreement:.3f}'}")
    lines.append(f"failed: {calibration['failed']} of {calibration['records']}")
    confusion = calibration["confusion"]
    columns = list(next(iter(confusion.values())))
    lines.append("known \\ given " + "".join(f"{column:>7}" for column in columns))
    lines += [f"{level:>13} " + "".join(f"{row[column]:7}" for column in columns) for level, row in confusion.items()]
    return "\n".join(lines)


def _accuracy(pairs: Sequence[tuple[Preference, Judgment]]) -> dict[str, Any] | None:
    decided = [(preference, judgment) for preference, judgment in pairs if preference.verdict.overall]
    if not decided:
        return None
    right = sum(judgment.reward is not None and judgment.reward * p.verdict.overall > 0 for p, judgment in decided)
    longer = [(len(p.response) - len(p.reference)) * p.verdict.overall for p, _ in decided]
    # Equal lengths decide nothing: half right.
    equal = sum(product == 0 for product in longer) / 2
    wins = sum(product > 0 for product in longer) + equal
    return {
        "accuracy": right / len(decided),
        "interval": list(wilson_interval(right, len(decided))),
        "n": len(decided),
        "length_only": max(wins, len(decided) - wins) / len(decided),
    }


def _confusion(pairs: Sequence[tuple[Preference, Judgment]], scale: Scale) -> tuple[dict[str, dict[str, int]], list[int]]:
    """Counts by known and given level, and the distances between them."""
    names = [str(level) for level in scale.values]
    known = sorted({*scale.values, *(preference.verdict.overall for preference, _ in pairs)})
    confusion = {str(level): dict.fromkeys([*names, FAILED], 0) for level in known}
    errors = []
    for preference, judgment in pairs:
        row = confusion[str(preference.verdict.overall)]
        given = [verdict.overall for verdict in (judgment.straight, judgment.swapped) if verdict is not None]
        row[FAILED] += judgment.reward is None
        for level in given:
            row[str(level)] += 1
            errors.append(abs(level - preference.verdict.overall))
    return confusion, errors
