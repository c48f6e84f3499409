"""Results of a study as JSON (mean, deviation and values over the seeds) and as one page of curves and tables."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from step_megatron.evaluation import page
from step_megatron.evaluation.charts import Series, line_chart
from step_megatron.evaluation.files import write_json, write_text
from step_megatron.studies.arms import Found, Row, Setting, Study, run_arms

_COLOURS = ("model", "probe", "other")
_NOTE = (
    "Means over the seeds, bands and ± of one sample deviation over them. Held-out prompts about real clips, replies sampled at "
    "temperature 1 and measured by a program that was not trained against."
)


def run_study(study: Study, setting: Setting) -> dict[str, Any]:
    """Run a study, write `results.json` and `report.html` into its folder, and return the results."""
    rl = setting.config(setting.out, 0, setting.start).rl
    size = {
        "iterations_a_leg": rl.iterations,
        "prompts_an_iteration": rl.rollout.prompts,
        "samples_a_prompt": rl.rollout.samples,
        "held_out_prompts": setting.held_out,
        "held_out_samples": setting.samples,
    }
    known = {"title": study.title, "start": str(setting.start), "seeds": list(setting.seeds), **size}
    results = known | summarise(study, run_arms(study, setting))
    write_json(setting.out / "results.json", results)
    write_text(setting.out / "report.html", report(study, results))
    return results


def summarise(study: Study, found: Found) -> dict[str, Any]:
    """The spread of every measure over the seeds, of every arm after every leg, the start first."""
    arms = {arm: [_spreads([rows[number] for rows in seeds]) for number in range(len(seeds[0]))] for arm, seeds in found.items()}
    return {"arms": arms} | ({"forgetting": _forgetting(study, found)} if study.forgetting else {})


def _forgetting(study: Study, found: Found) -> dict[str, dict[str, Any]]:
    """By arm and kind: held-out reward after the first leg less that after the second; above zero where it was lost."""
    return {
        arm: {kind: spread([rows[1][f"{kind}/reward"] - rows[2][f"{kind}/reward"] for rows in seeds]) for kind in study.kinds}
        for arm, seeds in found.items()
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one value) over the seeds, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": list(values)}


def _spreads(rows: Sequence[Row]) -> dict[str, Any]:
    return {name: rows[0][name] if name == "iterations" else spread([row[name] for row in rows]) for name in rows[0]}


def report(study: Study, results: Mapping[str, Any]) -> str:
    """The page."""
    arms = results["arms"]
    panels = [_panel(title, measure, arms) for title, measure in study.panels]
    parts = [page.header(study.title, f"{len(results['seeds'])} seeds, from {results['start']}", [])]
    if study.forgetting:
        heads = ("arm", *(f"{kind} lost in the second leg" for kind in study.kinds))
        rows = [(arm, *(_text(kinds[kind]) for kind in study.kinds)) for arm, kinds in results["forgetting"].items()]
        parts.append(
            page.section("Forgetting", "Held-out reward after the first leg less that after the second.", page.table(heads, rows))
        )
    parts.append(page.section("Over training", _NOTE, page.grid(panels)))
    parts.append(page.section("Figures", "After every leg.", page.table(*figures(study, results))))
    return page.page(study.title, parts)


def figures(study: Study, results: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of a table: every charted measure of every arm after every leg."""
    measures = [measure for _, measure in study.panels]
    rows = [
        (arm, f"{leg['iterations']:.0f}", *(_text(leg[measure]) if measure in leg else "–" for measure in measures))
        for arm, legs in results["arms"].items()
        for leg in legs
    ]
    return ("arm", "iterations", *(title for title, _ in study.panels)), rows


def _text(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.2f}" + ("" if spread["deviation"] is None else f" ± {spread['deviation']:.2f}")


def _panel(title: str, measure: str, arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A curve of means for every arm, with a band of one deviation."""
    series = []
    for colour, (arm, legs) in zip(itertools.cycle(_COLOURS), arms.items(), strict=False):
        known = [leg for leg in legs if measure in leg]
        points = [(leg["iterations"], leg[measure]["mean"]) for leg in known]
        series.append(Series(arm, points, colour, band=[leg[measure]["deviation"] or 0.0 for leg in known]))
    return line_chart(title, series)
