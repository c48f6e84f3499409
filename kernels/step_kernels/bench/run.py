"""The command: which cases an op has, and how they are run and reported."""

import argparse
import importlib
import json
from pathlib import Path

import torch

from step_kernels.bench import choosing, report
from step_kernels.bench.harness import measure

# The module that holds the cases of an op, as `MODULE.CASES[op](device) -> list[Case]`.
OPS = {
    "pool-norm-downsample": "segment_ops",
    "conv-downsample-gelu": "segment_ops",
    "fused-downsample": "segment_ops",
    "merge-audio": "segment_ops",
    "gae": "segment_ops",
    "audio-attention": "attention",
    "causal-attention": "attention",
    "paged-attention": "paged",
    "linear-cross-entropy": "loss",
    "skinny-linear": "decoding",
    "draw-tokens": "decoding",
}


def run(op: str, repeats: int | None = None, out: Path = Path("runs/bench"), device: str | None = None) -> dict:
    """Measure an op, print tables, write `OUT/OP.csv` and `OUT/OP.png`, and return the figures.

    Args:
        op: one of `OPS`.
        repeats: rounds; None for each case's own number.
        out: folder, made if absent.
        device: default: a GPU where torch sees one, else the CPU.

    Returns:
        `{"name", "ratio", "low", "high", "limit", "ok", "comparisons", ...}`; `ratio` (peer's time over ours: median, lowest and
        highest round) and `limit` are those of the comparison that comes nearest to its limit.

    Raises:
        RuntimeError: if contestants disagree in their results.
    """
    where = _device(device)
    make = importlib.import_module(f"step_kernels.bench.{OPS[op]}").CASES[op]
    results = []
    for case in make(where):
        results.append(measure(case, repeats, where))
        print(report.table(results[-1]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    report.write_csv(out / f"{op}.csv", results, where)
    missing = report.plot(out / f"{op}.png", results, where)
    print(f"{report.device_name(where)}, {report.version()}, {out / op}.csv{'' if missing else ' and .png'}")
    if missing:
        print(missing)
    return report.summary(op, results, where)


def choose(op: str, repeats: int = 15, device: str | None = None) -> dict:
    """Measure an op's backends and let the registry prefer the fastest from now on; see `choosing`."""
    return choosing.choose(op, repeats, _device(device))


def main(arguments: list[str] | None = None) -> int:
    """`python -m step_kernels.bench`."""
    parser = argparse.ArgumentParser(prog="python -m step_kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--repeats", type=int, help="rounds (default: 15, fewer where one takes long)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the CSV and the plot")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--choose", action="store_true", help="let the fastest backend be used on this device from now on")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args(arguments)
    if options.choose:
        result = choose(options.op, options.repeats or 15, options.device)
    else:
        result = run(options.op, options.repeats, options.out, options.device)
    if options.json:
        print(json.dumps(result))
    return 0


def _device(named: str | None) -> torch.device:
    return torch.device(named or ("cuda" if torch.cuda.is_available() else "cpu"))
