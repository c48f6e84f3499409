"""What `results.json` says of the stages after mid-training: the reward model's calibration, PPO's metrics, the win rate.

RUN/calibration.json    of a reward model's run, by `step-megatron judge calibrate --out`
RUN/metrics.jsonl       of a PPO run, a line an iteration
RUN/comparison.json     of a PPO run, by `step-megatron judge compare --out`
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from step_megatron.evaluation.files import write_json
from step_megatron.evaluation.run import stage_seconds
from step_megatron.runtime.metrics import read_metrics

CALIBRATION, COMPARISON = "calibration.json", "comparison.json"
# Iterations at either end whose mean is the reward before and after: one alone is noisy.
_ENDS = 3
_JUDGED = ("reward/preference", "reward/rubric")


def read_part(path: Path, made_by: str) -> dict[str, Any]:
    """A JSON file of a stage.

    Raises:
        FileNotFoundError: there is none; names the command that writes it.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `step-megatron {made_by} --out {path}` writes it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); write it anew") from None


def reward_model_results(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """`reward_model` of `results.json`; shares of plain and rubric records are None where there are none."""
    whole = calibration["all"]
    parts = {name: calibration[name] and calibration[name]["accuracy"] for name in ("plain", "rubric")}
    return {
        **{name: whole[name] for name in ("accuracy", "interval", "length_only", "n")},
        **parts,
        **{name: calibration[name] for name in ("order_disagreement", "failed", "records")},
    }


def ppo_results(metrics: Sequence[Mapping[str, float | None]], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """`ppo` of `results.json`: the judge's reward in the first and the last iterations, KL at the end, the largest |dlogp|.

    Rewards are as judged, -1 .. 1: the score that was trained on is normalised, so its mean says nothing.

    Raises:
        ValueError: no iteration was recorded.
    """
    if not metrics:
        raise ValueError("the PPO run has no metrics: it did not end an iteration; run its stage again")
    judged = [_mean(_known(row, _JUDGED)) for row in metrics]
    rewards = [reward for reward in judged if reward is not None]
    distances = [value for row in metrics for value in _known(row, ("rollout/dlogp_max",))]
    return {
        "reward_before": _mean(rewards[:_ENDS]),
        "reward_after": _mean(rewards[-_ENDS:]),
        "win_rate": comparison["win_rate"],
        "win_interval": comparison["interval"],
        "n": comparison["n"],
        "right_before": comparison["before"]["right"],
        "right_after": comparison["after"]["right"],
        "kl": metrics[-1].get("kl"),
        "max_abs_dlogp": max(distances, default=None),
        "iterations": int(metrics[-1]["step"]),
    }


def with_later_stages(run: Path, reward_run: Path | None, ppo_run: Path | None) -> dict[str, Any]:
    """The run's `results.json` with `reward_model` and `ppo` of the runs that are given and all stages' seconds; rewrites it.

    Raises:
        FileNotFoundError: the run was not evaluated, or a stage has not left what is read of it; says what writes it.
        ValueError: a file is damaged.
    """
    path = run / "results.json"
    results = read_part(path, f"eval --run {run}")
    if reward_run is not None:
        results["reward_model"] = reward_model_results(read_part(reward_run / CALIBRATION, "judge calibrate"))
    if ppo_run is not None:
        results["ppo"] = ppo_results(read_metrics(ppo_run), read_part(ppo_run / COMPARISON, "judge compare"))
    results["seconds"] |= stage_seconds(run)
    write_json(path, results)
    return results


def _known(row: Mapping[str, float | None], names: Sequence[str]) -> list[float]:
    values = (row.get(name) for name in names)
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
