"""Time the ops beside their peers, side by side in one run: `python -m step_kernels.bench OP` or `step-megatron bench OP`.

    harness.py     how anything is timed: rounds that alternate between contestants, ratios within a round, agreement of results
    contestants.py who takes part: each backend of ours that runs here, eager torch, torch.compile, and libraries where installed
    segment_ops.py, attention.py, loss.py      the cases: shapes, peers, and how much faster ours has to be
    choosing.py    the fastest backend of an op goes into the registry's file of choices
    report.py      table, CSV and plot

Needs torch only; matplotlib for plots, g++ for torch.compile on a CPU. A case is a few lines: see `segment_ops.py`.
"""

from step_kernels.bench.run import OPS, choose, main, run

__all__ = ["OPS", "choose", "main", "run"]
