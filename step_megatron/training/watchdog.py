"""Finds the rank that a run waits for in vain, names it with its Python stack, and ends the run, so that it can be restarted.

Without it one rank that hangs (a file system that does not answer, a lock, a kernel without end) shows as a collective's timeout
on all of the *others*, half an hour later.

The main thread says where it is by `Heartbeat.beat`, which costs an assignment. A thread beside it puts that into the job's
store and reads the others'. A rank hangs when it is the least advanced of all and has given no sign for the timeout; those that
wait for it in a collective are further on, or stand in one. Then every rank writes its stacks into `RUN/hangs/rank_R.txt`, the
verdict goes into `RUN/hangs/report.txt` and the log, and all ranks leave with status 75. A rank whose thread gives no sign either
is stopped, dead, or held by C code that keeps the interpreter; a timer of `faulthandler`, which needs no interpreter, writes its
stacks.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from step_megatron.runtime.progress import get_logger

# sysexits.h: a temporary failure, try again.
EXIT_STATUS = 75
FOLDER = "hangs"
# In the order in which a step (an iteration of PPO) goes through them.
PHASES = ("load", "encode", "generate", "judge", "score", "compute", "exchange", "update", "validate", "save")
# Longest pause between two looks, and how long ranks wait for each other's stacks, in seconds.
_TICK, _GRACE = 10.0, 3.0
# Whoever stands in one of these files waits for others.
_WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Pulse:
    """Where a rank's main thread is; `turn` counts the steps that it ran, those of before it went back too."""

    turn: int = 0
    step: int = 0
    phase: str = PHASES[0]
    beats: int = 0

    @property
    def place(self) -> tuple[int, int]:
        return self.turn, PHASES.index(self.phase)


class Heartbeat:
    """Set by the main thread, read by the watchdog's."""

    def __init__(self) -> None:
        self.pulse = Pulse()

    def next_turn(self, step: int) -> None:
        """A step begins."""
        self.pulse = Pulse(self.pulse.turn + 1, step, PHASES[0], self.pulse.beats + 1)

    def beat(self, phase: str | None = None) -> None:
        """The step goes into a phase, or is alive within its phase."""
        self.pulse = replace(self.pulse, phase=phase or self.pulse.phase, beats=self.pulse.beats + 1)


@dataclass(frozen=True)
class Stand:
    """What a rank says of its main thread when the run hangs: innermost function, its place, and whether it waits for others."""

    function: str
    place: str
    waits: bool


def suspects(pulses: Mapping[int, Pulse], still: Mapping[int, float], timeout: float) -> list[int]:
    """The least advanced ranks, if none of them has given a sign for `timeout` seconds; else nobody.

    Args:
        still: seconds since each rank's pulse was seen to change.
    """
    least = min(pulse.place for pulse in pulses.values())
    last = sorted(rank for rank, pulse in pulses.items() if pulse.place == least)
    return last if all(still[rank] > timeout for rank in last) else []


def culprits(ranks: list[int], stands: Mapping[int, Stand]) -> list[int]:
    """Of the suspects, those that do not wait themselves; all of them where everybody waits."""
    return [rank for rank in ranks if rank not in stands or not stands[rank].waits] or ranks


class Watchdog:
    """Watches over the ranks inside a `with` block.

    Args:
        heartbeat: of this rank.
        store: that all ranks share, a client of this object's own: a thread that waits in a store holds it.
        rank, world_size: of this rank.
        run_dir: `hangs/` is made in it when there is something to say.
        timeout: seconds; 0 watches nothing.
    """

    def __init__(self, heartbeat: Heartbeat, store: dist.Store, rank: int, world_size: int, run_dir: str | Path, timeout: float):
        self._heartbeat, self._store, self._rank, self._size = heartbeat, store, rank, world_size
        self._folder, self._timeout = Path(run_dir) / FOLDER, timeout
        self._tick = min(_TICK, timeout / 10)
        self._seen: dict[int, tuple[Pulse, float]] = {}
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._main = threading.main_thread().ident

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._folder / f"rank_{self._rank}.txt", "a", encoding="utf-8")
            # For a main thread that keeps the interpreter before the watching one has had it once.
            faulthandler.dump_traceback_later(self._timeout, file=self._stacks)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._timeout:
            return
        self._leaving.set()
        self._thread.join()
        self._stacks.close()
        if not (path := Path(self._stacks.name)).stat().st_size:
            path.unlink()
        with contextlib.suppress(OSError):
            # Not as long as another rank's file is there.
            self._folder.rmdir()

    def _watch(self) -> None:
        before, watched = time.monotonic(), 0.0
        while not self._leaving.wait(self._tick):
            # Longer than this thread's own silence: it fires where the thread cannot run.
            faulthandler.dump_traceback_later(self._timeout, file=self._stacks)
            now = time.monotonic()
            # Time in which this process was stopped, or got no processor, is nobody's silence.
            watched += min(now - before, 2 * self._tick)
            before = now
            if hung := self._look(watched):
                self._end(hung)
        faulthandler.cancel_dump_traceback_later()

    def _look(self, now: float) -> list[int]:
        """Publish this rank's pulse and take in the others'; the suspects, if the run hangs.

        Args:
            now: seconds that this process has been watching.
        """
        pulses = {self._rank: self._heartbeat.pulse}
        try:
            self._store.set(f"pulse/{self._rank}", json.dumps(asdict(pulses[self._rank])))
            if self._store.check(["hang"]):
                return json.loads(self._store.get("hang"))
            pulses = self._pulses()
        except RuntimeError:
            # The store has gone with the rank that held it: this rank looks after itself.
            pass
        for rank, pulse in pulses.items():
            if rank not in self._seen or self._seen[rank][0] != pulse:
                self._seen[rank] = (pulse, now)
        return suspects(pulses, {rank: now - self._seen[rank][1] for rank in pulses}, self._timeout)

    def _pulses(self) -> dict[int, Pulse]:
        """Of all ranks; one that has not come yet is behind all others."""
        keys = {rank: f"pulse/{rank}" for rank in range(self._size)}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        told = dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True))
        return {rank: Pulse(**json.loads(told[rank])) if rank in told else Pulse() for rank in range(self._size)}

    def _end(self, hung: list[int]) -> None:
        """Write down what there is to say, and end this process."""
        try:
            self._tell(hung)
        finally:
            # The main thread stands where it stands; nothing that a normal exit runs could be waited for.
            os._exit(EXIT_STATUS)

    def _tell(self, hung: list[int]) -> None:
        faulthandler.cancel_dump_traceback_later()
        print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}: {self._heartbeat.pulse}", file=self._stacks, flush=True)
        faulthandler.dump_traceback(self._stacks)
        stands = {self._rank: stand_of(sys._current_frames()[self._main])}
        try:
            self._store.set("hang", json.dumps(hung))
            self._store.set(f"stand/{self._rank}", json.dumps(asdict(stands[self._rank])))
            stands |= self._stands_of_others()
        except RuntimeError as error:
            logger.warning("the store of the job does not answer: %s", error)
        report = self._report(culprits(hung, stands), stands)
        logger.error("%s", report)
        if self._rank == min(stands):
            with open(self._folder / "report.txt", "a", encoding="utf-8") as file:
                file.write(report + "\n")
        sys.stderr.flush()

    def _stands_of_others(self) -> dict[int, Stand]:
        stands: dict[int, Stand] = {}
        until = time.monotonic() + _GRACE + 2 * self._tick
        while len(stands) < self._size and time.monotonic() < until:
            for rank in set(range(self._size)) - stands.keys():
                if self._store.check([f"stand/{rank}"]):
                    stands[rank] = Stand(**json.loads(self._store.get(f"stand/{rank}")))
            time.sleep(0.05)
        # So that the others, too, find this rank's; the first rank may hold the store, so it leaves last.
        time.sleep(_GRACE / 3 if self._rank == 0 else _GRACE / 10)
        return stands

    def _report(self, blamed: list[int], stands: dict[int, Stand]) -> str:
        lines = [
            f"the run hangs: no sign of {_ranks(blamed)} for {self._timeout:g} s "
            f"(training.hang_timeout_seconds); stacks are in {self._folder}"
        ]
        for rank, (pulse, _) in sorted(self._seen.items()):
            stand = stands.get(rank)
            where = f"in {stand.function} ({stand.place})" if stand else "silent: dead, stopped, or inside C code"
            what = "HANGS" if rank in blamed else "waits"
            lines.append(f"  rank {rank} {what}: step {pulse.step}, {pulse.phase}, {where}")
        return "\n".join(lines)


def stand_of(frame: FrameType) -> Stand:
    """Where a thread stands."""
    code = frame.f_code
    waits = any(part in code.co_filename for part in _WAITING)
    return Stand(code.co_qualname, f"{code.co_filename}:{frame.f_lineno}", waits)


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
