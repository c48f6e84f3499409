"""What a measurement leaves behind: a table for people, a CSV for later comparison, a plot, and one JSON object."""

import csv
import statistics
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from step_kernels import choices
from step_kernels.bench.harness import Contestant, Measured, percentiles

COLUMNS = ("op", "shape", "backend", "p20", "p50", "p80", "device", "version")


def table(measured: Measured) -> str:
    """Milliseconds of every contestant, and how many times as long as ours it took."""
    rounds = len(measured.seconds.get(measured.ours, ()))
    lines = [f"{measured.case.op}  {measured.case.shape}, {rounds} rounds"]
    for contestant in measured.case.contestants:
        name = contestant.name
        if name in measured.absent:
            lines.append(f"  {name:22} -          {measured.absent[name]}")
        elif samples := measured.seconds.get(name):
            low, middle, high = (1e3 * value for value in percentiles(samples))
            line = f"  {name:22} {middle:9.3f} ms ({low:.3f}-{high:.3f})"
            if name != measured.ours:
                low, middle, high = percentiles(measured.ratios(name))
                line += f"  {middle:6.2f}x ({low:.2f}-{high:.2f})"
                line += f", at least {contestant.limit:g} wanted" if contestant.limit else ""
            if name == "torch.compile" or name.startswith("flex"):
                line += f"; compiled in {measured.first_run[name]:.0f} s"
            if name in measured.extra_bytes:
                line += f"; {measured.extra_bytes[name] / 2**20:.0f} MiB extra"
            lines.append(line)
        else:
            lines.append(f"  {name:22} not timed: ours cannot run")
    return "\n".join(lines)


def summary(op: str, results: Sequence[Measured], device: torch.device) -> dict:
    """The JSON object of an op: `ratio` and its spread are those of the comparison that comes nearest to its limit."""
    comparisons = [
        {"shape": each.case.shape, "peer": contestant.name, **_comparison(each, contestant)}
        for each in results
        for contestant in each.case.contestants[1:]
        if each.seconds.get(contestant.name)
    ]
    demanded = [each for each in comparisons if each["limit"]]
    tightest = min(demanded, key=lambda each: each["ratio"] / each["limit"], default=None)
    memory = [each["memory_share"] <= each["memory_limit"] for each in comparisons if "memory_limit" in each]
    return {
        "name": op,
        **(tightest or {"ratio": None, "low": None, "high": None, "limit": None}),
        "ok": bool(demanded) and all(memory) and all(each["ratio"] >= each["limit"] for each in demanded),
        "comparisons": comparisons,
        "milliseconds": {
            each.case.shape: {name: 1e3 * statistics.median(samples) for name, samples in each.seconds.items() if samples}
            for each in results
        },
        "absent": {each.case.shape: each.absent for each in results if each.absent},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "version": version(),
    }


def _comparison(measured: Measured, contestant: Contestant) -> dict:
    ratios = measured.ratios(contestant.name)
    said = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "limit": contestant.limit}
    if contestant.memory_limit is not None:
        said["memory_share"] = measured.extra_bytes[measured.ours] / max(1, measured.extra_bytes[contestant.name])
        said["memory_limit"] = contestant.memory_limit
    return said


def write_csv(path: Path, results: Sequence[Measured], device: torch.device) -> None:
    """One row per shape and contestant, milliseconds."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for each in results:
            for name, samples in each.seconds.items():
                if samples:
                    times = (f"{1e3 * value:.4f}" for value in percentiles(samples))
                    writer.writerow([each.case.op, each.case.shape, name, *times, device_name(device), version()])


def plot(path: Path, results: Sequence[Measured], device: torch.device) -> str:
    """Bars of the medians with the 20th to 80th percentile, one panel a shape; returns why there is none, else nothing."""
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed; pip install matplotlib"
    from matplotlib.figure import Figure

    timed = [each for each in results if any(each.seconds.values())]
    if not timed:
        return "no plot: nothing was timed"
    figure = Figure(figsize=(9, 0.5 + sum(0.7 + 0.3 * len(each.seconds) for each in timed)), layout="constrained")
    panels = figure.subplots(len(timed), squeeze=False, height_ratios=[1 + len(each.seconds) for each in timed])[:, 0]
    for panel, each in zip(panels, timed, strict=True):
        names = list(each.seconds)[::-1]
        spread = [[1e3 * value for value in percentiles(each.seconds[name])] for name in names]
        errors = [[middle - low for low, middle, _ in spread], [high - middle for _, middle, high in spread]]
        colours = ["#0b6e4f" if name.startswith("ours") else "#9aa5b1" for name in names]
        bars = panel.barh(names, [middle for _, middle, _ in spread], xerr=errors, color=colours, error_kw={"ecolor": "#333"})
        panel.bar_label(bars, [f" {middle:.3g}" for _, middle, _ in spread], fontsize=8)
        panel.set_title(f"{each.case.op}, {each.case.shape}", fontsize=9, loc="left")
        panel.margins(x=0.15)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"milliseconds; {device_name(device)}, {version()}", fontsize=8)
    figure.savefig(path, dpi=120)
    return ""


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the threads that torch uses."""
    name = choices.device_name(device)
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def version() -> str:
    """What a figure depends on besides the device: torch's release."""
    return f"torch {torch.__version__}"
