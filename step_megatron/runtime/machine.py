"""What this machine gives to this process: cores and memory, no more than the container's limits."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: those it is bound to, no more than the container's share (cgroup v2 `cpu.max`)."""
    bound = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not (quota.isdigit() and period.isdigit()):
        return bound
    return max(1, min(bound, math.ceil(int(quota) / int(period))))


def memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Memory that this process may use: the machine's, no more than the container's limit (cgroup v2 `memory.max`)."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: Path) -> str:
    """The file's text, "" when there is none (no limit)."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
