"""The report's sections on reinforcement learning: the reward model beside a length-only baseline; PPO's curves, its win rate and
replies before and after. `report.py` puts them into the page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_megatron.evaluation import page
from step_megatron.evaluation.charts import Bar, Series, bar_panel, line_chart
from step_megatron.evaluation.rl_results import CALIBRATION, COMPARISON, read_part
from step_megatron.runtime.metrics import read_metrics

_COLOURS = ("model", "other", "probe", "second", "plain")


def reward_model_section(run: Path | None) -> str:
    """How well the reward model judges held-out preferences; nothing without a run."""
    if run is None:
        return ""
    found = read_part(run / CALIBRATION, "judge calibrate")
    panels = [_accuracy_panel(name, found[name]) for name in ("all", "plain", "rubric") if found[name]]
    disagreement, metrics = found["order_disagreement"], read_metrics(run)
    note = (
        "Held-out constructed preferences, split by transcript: how often the reward favours the reply that is better by "
        "construction. A tie or a failed judgment is wrong. “Length alone” is the better of “longer wins” and “shorter wins” on "
        "the same records."
    )
    told = [
        f"The two orders of a pair favour different replies in {page.share(disagreement)} of the records.",
        f"{found['failed']} of {found['records']} judgments failed.",
    ]
    chart = line_chart(
        "Loss of the reward model", [Series("train", _points(metrics, "loss"), smooth=True)], "nats per trained token"
    )
    return page.section(
        "Does the reward model judge?",
        note,
        page.grid([*panels, chart]),
        page.bullets(told),
        "<h3>Known level (rows) and given level</h3>",
        _confusion(found["confusion"]),
    )


def ppo_section(run: Path | None) -> str:
    """PPO's curves, the win rate and example replies; nothing without a run."""
    if run is None:
        return ""
    comparison, metrics = read_part(run / COMPARISON, "judge compare"), read_metrics(run)
    kinds = sorted({key for row in metrics for key in row if key.startswith("reward/") and not key.endswith("_failed")})
    rewards = [
        Series(kind.removeprefix("reward/").replace("_", " "), _points(metrics, kind), _COLOURS[i % len(_COLOURS)])
        for i, kind in enumerate(kinds)
    ]
    largest = Series("largest", _points(metrics, "rollout/dlogp_max"), "other")
    mean = Series("mean", _points(metrics, "rollout/dlogp_mean"))
    charts = [
        line_chart("Reward by kind", rewards, "mean of an iteration"),
        line_chart("KL from the SFT model", [Series("kl", _points(metrics, "kl"))], "nats per reply"),
        line_chart("Entropy", [Series("entropy", _points(metrics, "entropy"))], "nats per token"),
        line_chart("Reply length", [Series("tokens", _points(metrics, "response_tokens"))], "tokens, reasoning included"),
        line_chart("|Δ log p| of rollout and trainer", [largest, mean], "same tokens, same weights", log=True),
        _win_panel(comparison),
    ]
    note = (
        "Rewards are by the reward model, on training prompts. The win rate is on held-out prompts against the SFT model, greedy "
        "replies, by a program that nobody was trained against: the right answer first, then a sentence; a tie is half a win."
    )
    return page.section(
        "What did PPO change?",
        note,
        page.grid(charts),
        _shares(comparison),
        "<h3>Replies before and after</h3>",
        _examples(comparison),
    )


def _points(metrics: Sequence[Mapping[str, float | None]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics if row.get(key) is not None]


def _accuracy_panel(name: str, part: Mapping[str, Any]) -> str:
    title = {"all": "All preferences", "plain": "Without a rubric", "rubric": "With a rubric"}[name]
    bars = [
        Bar("accuracy", part["accuracy"], "model", part["interval"]),
        Bar("length alone", part["length_only"], "plain"),
    ]
    return bar_panel(title, f"{part['n']} records that favour a reply", bars)


def _confusion(confusion: Mapping[str, Mapping[str, int]]) -> str:
    columns = list(next(iter(confusion.values())))
    return page.table(
        ("known \\ given", *columns), [(level, *(row[column] for column in columns)) for level, row in confusion.items()]
    )


def _win_panel(comparison: Mapping[str, Any]) -> str:
    n = comparison["n"] or 1
    bars = [
        Bar("win rate", comparison["win_rate"], "model", comparison["interval"]),
        Bar("wins", comparison["wins"] / n, "probe"),
        Bar("ties", comparison["ties"] / n, "plain"),
        Bar("losses", comparison["losses"] / n, "other"),
    ]
    return bar_panel("Win rate against SFT", f"{comparison['n']} held-out prompts", bars)


def _shares(comparison: Mapping[str, Any]) -> str:
    rows = [
        (name, *(page.share(comparison[side][key]) for side in ("before", "after")))
        for name, key in (("right answer", "right"), ("a sentence", "form"), ("words", "words"))
    ]
    return "<p></p>" + page.table(("held-out replies", "before (SFT)", "after (PPO)"), rows)


def _examples(comparison: Mapping[str, Any]) -> str:
    cards = []
    for example in comparison["examples"]:
        rows = [("question", example["question"]), ("answer", example["answer"])]
        rows += [(side, example[side] or "(no reply: the reasoning never ended)") for side in ("before", "after")]
        rows.append(
            ("verdict", {1: "after wins", 0: "tie", -1: "before wins"}[(example["reward"] > 0) - (example["reward"] < 0)])
        )
        cards.append(f"<h3>{page.escape(example['task'].replace('_', ' '))}</h3>{page.facts(rows)}")
    return page.grid(cards)
