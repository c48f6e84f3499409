"""How contestants are timed: in turns, so that what else the machine does hits all of them alike.

Every round runs each contestant once (often enough to fill some milliseconds), and a ratio is formed within the round; what is
reported is the median over the rounds with the 20th and 80th percentile. Contestants must agree in their results, or the
comparison is worth nothing and is refused.
"""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

# A sample repeats a short work until it takes about this long: the clock and a context switch then weigh under a per cent.
_SAMPLE_SECONDS = 0.01

Work = Callable[[], torch.Tensor | Sequence[torch.Tensor]]


class Absent(Exception):
    """A contestant that cannot take part here; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way of doing the case's work.

    Attributes:
        name: as tables show it.
        prepare: makes what is not timed (inputs in its own layout, compilation) and returns the work; raises `Absent` with the
            reason where it cannot run.
        limit: ours has to be at least this many times as fast; None where nothing is asked for.
        memory_limit: ours may use at most this share of its extra peak memory; None where nothing is asked for.
        comparable: brings each result into the layout of ours, for the comparison only (a padded batch becomes packed).
        within: what it is prepared and run in, such as a choice of backend; entering it is not timed.
    """

    name: str
    prepare: Callable[[], Work]
    limit: float | None = None
    memory_limit: float | None = None
    comparable: Callable[[torch.Tensor], torch.Tensor] | None = None
    within: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Case:
    """Contestants over one shape; the first is ours and the measure of all ratios.

    Attributes:
        tolerance: largest difference between results, relative to the largest value.
        memory: measure extra peak memory too.
        rounds: how many, where nobody asks for another number.
    """

    op: str
    shape: str
    contestants: Sequence[Contestant]
    tolerance: float = 1e-4
    memory: bool = False
    rounds: int = 15


@dataclass
class Measured:
    """What came of a case: per contestant its samples in seconds, the duration of its first run (with compilation), its extra
    peak bytes; and who could not take part, why."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    first_run: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        return self.case.contestants[0].name

    def ratios(self, name: str) -> list[float]:
        """Per round, how many times as long as ours a contestant took."""
        return [theirs / ours for theirs, ours in zip(self.seconds[name], self.seconds[self.ours], strict=True)]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, between samples by a straight line."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    steps = statistics.quantiles(values, n=10, method="inclusive")
    return steps[1], steps[4], steps[7]


def measure(case: Case, repeats: int | None, device: torch.device) -> Measured:
    """Run a case: prepare everybody, compare results, then `repeats` rounds (None: the case's own number).

    Raises:
        RuntimeError: two contestants compute something else.
    """
    measured = Measured(case)
    works: dict[str, Work] = {}
    times: dict[str, int] = {}
    expected = None
    within = {contestant.name: contestant.within for contestant in case.contestants}
    for contestant in case.contestants:
        _say(f"{case.op} {case.shape}: preparing {contestant.name}")
        with contestant.within():
            start = time.perf_counter()
            try:
                work = contestant.prepare()
                begun = time.perf_counter()
                result = _tensors(work())
                if contestant.comparable:
                    result = [contestant.comparable(each) for each in result]
            except Absent as reason:
                measured.absent[contestant.name] = str(reason)
                continue
            _wait(device)
            measured.first_run[contestant.name] = time.perf_counter() - start
            expected = expected or (contestant.name, result)
            # What takes seconds is run once a sample; to find that out by another run would take as long as a round.
            slow = time.perf_counter() - begun > 100 * _SAMPLE_SECONDS
            _agree(case, contestant.name, result, *expected)
            del result
            if case.memory:
                measured.extra_bytes[contestant.name] = extra_bytes(work, device)
            times[contestant.name] = 1 if slow else _inner(work, device)
        works[contestant.name] = work
    del expected
    measured.seconds = {name: [] for name in works}
    if measured.ours not in works:
        return measured
    repeats = repeats or case.rounds
    for index in range(repeats):
        _say(f"{case.op} {case.shape}: round {index + 1} of {repeats}")
        for name, work in works.items():
            with within[name]():
                measured.seconds[name].append(_time(work, times[name], device))
    _say("")
    return measured


def extra_bytes(work: Work, device: torch.device) -> int:
    """Peak memory of a work above what was held before, without its results."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = _tensors(work())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        # Of the process, so that the scratch memory of native kernels counts; freed memory goes back to the system first.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        result = _tensors(work())
        peak = _status("VmHWM")
    return max(0, peak - before - sum(tensor.nbytes for tensor in result))


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def _tensors(result: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [result.detach()] if isinstance(result, torch.Tensor) else [tensor.detach() for tensor in result]


def _agree(case: Case, name: str, result: list[torch.Tensor], other: str, expected: list[torch.Tensor]) -> None:
    for index, (one, two) in enumerate(zip(result, expected, strict=True)):
        if one.shape != two.shape:
            raise RuntimeError(f"{case.op} {case.shape}: {name} gives {list(one.shape)}, {other} {list(two.shape)}")
        if not two.numel():
            continue
        difference, largest = (one.double() - two.double()).abs().max().item(), two.double().abs().max().item()
        if not difference <= case.tolerance * largest:
            raise RuntimeError(
                f"{case.op} {case.shape}: result {index} of {name} differs from that of {other} by {difference:.1e}; "
                f"values reach {largest:.2g}"
            )


def _inner(work: Work, device: torch.device) -> int:
    """How often a sample repeats the work."""
    once = _time(work, 1, device)
    if once < _SAMPLE_SECONDS:
        once = min(once, _time(work, 1, device))
    return max(1, min(2000, round(_SAMPLE_SECONDS / max(once, 1e-9))))


def _time(work: Work, times: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(text: str) -> None:
    """Progress on one line of a terminal; nothing elsewhere."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
