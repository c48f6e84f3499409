"""Saving while training goes on: `Checkpoints`, which a trainer owns.

A save has two halves. In the step the state is planned and copied into host memory. Then a thread of every rank writes its part
and sums it up; when all have, the first rank seals the checkpoint, renames it, moves `latest` and deletes what need not stay. The
threads agree over a process group of their own, so that no step waits for them, and a rank that raises an exception meanwhile
does not keep the others from completing. One save is in flight at most: the next one waits for it.

A save that fails (a full disk) is undone and said, and training goes on to try again at the next; only a run whose last save
failed ends with an error.
"""

import dataclasses
import datetime
import errno
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step_megatron.checkpoint import directory, seal
from step_megatron.checkpoint.directory import CheckpointError, Retention
from step_megatron.checkpoint.distributed import LAYOUT, training_state
from step_megatron.checkpoint.writing import HostCopies, Written, write_index, write_items
from step_megatron.runtime import folders
from step_megatron.runtime.agreement import Ranks
from step_megatron.runtime.megatron_writing import WritePlan, WritePlanner
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)
KEEP_ALL = Retention()
_TIMEOUT = datetime.timedelta(minutes=30)
_REMEDIES = {
    errno.ENOSPC: "free some space, or keep fewer checkpoints (training.keep_checkpoints)",
    errno.EDQUOT: "free some of your quota, or keep fewer checkpoints (training.keep_checkpoints)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: "give yourself the right to write there, or name another run.dir",
    errno.EPERM: "give yourself the right to write there, or name another run.dir",
    errno.EROFS: "it is mounted read-only: remount it, or name another run.dir",
    errno.ENOENT: "run.dir has to be on a file system that all nodes share, and nothing may delete it",
}


@dataclass(frozen=True)
class _Job:
    step: int
    final: Path
    plan: WritePlan
    notes: dict[str, Any]
    started: float


@dataclass(frozen=True)
class _Report:
    """What a rank did: its part, or what went wrong."""

    written: Written
    failure: str = ""


class Checkpoints:
    """The checkpoints that a run writes; every rank makes one and calls the same methods in the same order.

    Args:
        asynchronous: write beside the training, from a copy of the state in host memory, allocated at the first save.
        timeout: how long the ranks wait for the slowest to have written its part.

    Raises:
        CheckpointError: nothing can be written there; on every rank.
    """

    def __init__(
        self,
        run_dir: str | Path,
        retention: Retention = KEEP_ALL,
        asynchronous: bool = True,
        timeout: datetime.timedelta = _TIMEOUT,
    ):
        self._root = directory.checkpoint_root(run_dir)
        self._retention = retention
        self._ranks = Ranks.apart(timeout)
        self._planner = WritePlanner(self._ranks)
        self._copies = HostCopies() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[str] | None = None
        self._failure = ""
        if failure := self._ranks.from_first(self._try_the_place):
            self._thread.shutdown()
            raise CheckpointError(failure)

    def save(
        self,
        step: int,
        model: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        extra: dict[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Save this step; when it returns, the state may change. A failure is logged, and kept for `wait`.

        Args:
            model: this rank's chunks, wrapped for data parallelism or not, holding their parameters after the last update.
            extra: what else the run needs to go on (loader position and the like), plain values, equal on all ranks.
            validation_loss: as measured at this step, for `Retention.best`.
        """
        self._settle(f"step {step} is to be saved: raise training.save_interval, or write to a faster disk")
        started, final = time.perf_counter(), directory.checkpoint_at(self._root, step)
        self._failure = self._ranks.from_first(lambda: self._begin(final))
        if self._failure:
            return
        plan = self._planner.plan(training_state(step, model, optimizer, scheduler, extra), LAYOUT)
        if self._copies is not None:
            plan = dataclasses.replace(plan, items=self._copies.of(plan.items))
        notes = {"step": step} | ({} if validation_loss is None else {"validation_loss": validation_loss})
        self._writing = self._thread.submit(self._complete, _Job(step, final, plan, notes, started))
        if self._copies is None:
            self._settle()

    def wait(self) -> None:
        """Wait until the last save is complete, on the disk.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        self._settle()
        if self._failure:
            raise CheckpointError(self._failure)

    def close(self) -> None:
        """Let a save that is in flight complete; raises nothing, so that what ended the run is what is seen."""
        self._settle()
        self._thread.shutdown()

    def _settle(self, reason: str = "") -> None:
        """Wait for the save in flight, and say so where the training has to."""
        if self._writing is None:
            return
        if reason and self._ranks.rank == 0 and not self._writing.done():
            logger.warning("waiting for the checkpoint before this one, which is not written yet when %s", reason)
        self._failure = self._writing.result()
        self._writing = None

    def _try_the_place(self) -> str:
        """On the first rank, before there is anything to lose: whether something can be written."""
        probe = self._root / ".probe"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            return f"{self._root}: no checkpoint can be written here: {_explain(error)}"
        return ""

    def _begin(self, final: Path) -> str:
        try:
            folders.start_partial(final)
        except OSError as error:
            return self._failed(final, _explain(error))
        return ""

    def _complete(self, job: _Job) -> str:
        """On the thread of every rank: write, agree, finish; returns what went wrong, the same on every rank, or nothing."""
        report = self._write(job)
        try:
            reports = self._ranks.gather(report)
            return self._ranks.from_first(lambda: self._finish(job, reports))
        except RuntimeError as error:
            # Of the process group: a rank is gone.
            return self._failed(job.final, f"the ranks could not agree: {str(error).splitlines()[0]}")

    def _write(self, job: _Job) -> _Report:
        try:
            return _Report(write_items(folders.partial_of(job.final), self._ranks.rank, job.plan.items))
        except OSError as error:
            return _Report(Written(), f"rank {self._ranks.rank}: {_explain(error)}")
        except Exception as error:
            # A defect; the other ranks wait to hear of it.
            logger.exception("rank %d could not write its part of %s", self._ranks.rank, job.final)
            return _Report(Written(), f"rank {self._ranks.rank}: {error!r}")

    def _finish(self, job: _Job, reports: list[_Report]) -> str:
        """On the first rank, when all have written."""
        if failures := [report.failure for report in reports if report.failure]:
            return self._failed(job.final, "; ".join(failures))
        parts = [report.written for report in reports]
        partial = folders.partial_of(job.final)
        try:
            sums = write_index(partial, job.plan.metadata, job.plan.common, parts)
            seal.write_seal(partial, sums, job.notes)
            folders.finish_partial(job.final)
            directory.point_to(job.final)
        except OSError as error:
            return self._failed(job.final, f"rank 0: {_explain(error)}")
        size, seconds = sum(each.bytes for each in sums.values()), time.perf_counter() - job.started
        logger.info("saved %s: %.3g GB, complete after %.1f s", job.final, size / 1e9, seconds)
        try:
            directory.remove_others(job.final, self._retention, lambda path: seal.notes_of(path).get("validation_loss"))
        except OSError as error:
            logger.warning("%s: older checkpoints could not be deleted: %s", self._root, _explain(error))
        return ""

    def _failed(self, final: Path, reason: str) -> str:
        """Undo what there is of a save, and say that it failed."""
        failure = f"{final} could not be saved: {reason}"
        if self._ranks.rank == 0:
            partial = folders.partial_of(final)
            with suppress(OSError):
                written = sum(path.stat().st_size for path in partial.iterdir())
                free = shutil.disk_usage(self._root).free
                failure += f" ({written / 1e9:.3g} GB of it were written, with {free / 1e9:.3g} GB free)"
            folders.abandon_partial(final)
            failure += ". Checkpoints from before are as they were"
            logger.error("%s. While there are steps left the run goes on, and its next save tries again.", failure)
        return failure


def _explain(error: OSError) -> str:
    """What the system said, and what to do about it."""
    said = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    remedy = _REMEDIES.get(error.errno)
    return f"{said}: {remedy}" if remedy else said
