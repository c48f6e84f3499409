"""How the benchmarks write what several rounds came to."""

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> str:
    """Median (lowest-highest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
