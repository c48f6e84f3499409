"""Pools of gloo processes that tests run functions in: one pool per world size, kept for the whole session.

Starting a process costs 4-5 CPU-seconds of imports; a pool pays that once (its processes are forked from one that has imported
everything), and every layout then runs in it by `initialize(config)` ... `shutdown()`.

Use it through the fixture in `tests/conftest.py`:

    def train(rank, world_size, *, layout):                     # in a module that the workers can import
        runtime = initialize(config_for(layout))                # shutdown() follows by itself
        return losses                                           # anything that pickles; tensors come back as copies

    def test_losses(worker_pool):
        results = worker_pool(4).run(train, {"layout": "tp2pp2"})                         # one result per rank, in rank order
        results = worker_pool(2).run("tests.parallel.layouts:train", {"layout": "tp2"})   # the same by name

The function has to be importable: at the top level of a test file or of any module under `tests/`. Ranks see torchrun's
variables (RANK, WORLD_SIZE, ...), one OpenMP thread each, and generators seeded with 0 before each call. When a rank raises,
`run` fails with that rank's traceback; when ranks do not come back in `timeout` seconds, it fails with the Python stack of
each rank that is still at work. Either way the pool is ended and a fresh one is started by the next `run`, so that one
failure does not spoil other tests.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
# Imported once, by the process that all workers are forked from.
PRELOAD = [
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "step_megatron.training.stage",
    "torch.utils.tensorboard",
]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# After one rank has failed, how long the others may take to end; most of them wait for a message that will never come.
_GRACE_SECONDS = 3.0


class WorkerError(AssertionError):
    """A function failed on some rank, or did not end in time; the message holds what is known of every rank."""


class WorkerPool:
    """`world_size` processes that form one gloo job; see the module's docstring."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._store: dist.TCPStore | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="worker-pool-"))

    def run(self, function: Callable | str, kwargs: dict[str, Any] | None = None, timeout: float = 180.0) -> list[Any]:
        """Call `function(rank, world_size, **kwargs)` on every rank at once.

        Args:
            function: importable at the top level of its module, or `"module:name"`.
            kwargs: have to pickle.
            timeout: seconds before the call fails with the stacks of the ranks.

        Returns:
            One result per rank, in rank order.

        Raises:
            WorkerError: a rank raised, died, or did not end in time.
        """
        if not self._processes:
            self._start()
        target = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        task = pickle.dumps((target, list(sys.path), kwargs or {}))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        answers, failure = self._collect(timeout)
        if failure:
            report = self._report(target, failure, answers)
            self.close(keep_folder=True)
            raise WorkerError(report)
        return [pickle.loads(answers[rank][1]) for rank in range(self.world_size)]

    def close(self, keep_folder: bool = False) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None
        if not keep_folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        # The store lives here and on a port that the system chose, so that two pools never meet.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            variables = torchrun_variables(rank, self.world_size, self._store.port)
            arguments = (rank, self.world_size, theirs, variables, str(self._log(rank)), str(self._stack(rank)))
            process = context.Process(target=_worker, args=arguments, daemon=True, name=f"rank {rank} of {self.world_size}")
            # Read by the OpenMP of the forked processes' common ancestor, before it imports torch.
            with environment(ONE_THREAD):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float) -> tuple[dict[int, tuple[str, Any]], str]:
        """Wait for every rank's answer: (answers by rank, what went wrong or "")."""
        answers: dict[int, tuple[str, Any]] = {}
        failure = ""
        deadline = time.monotonic() + timeout
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                return answers, failure or f"not finished after {timeout:g} s"
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    answers[rank] = ("died", f"the process ended with exit code {self._processes[rank].exitcode}")
                if answers[rank][0] != "ok" and not failure:
                    failure = f"rank {rank} failed"
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return answers, failure

    def _report(self, target: str, failure: str, answers: dict[int, tuple[str, Any]]) -> str:
        for rank, process in enumerate(self._processes):
            if rank not in answers and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        out = io.StringIO()
        print(f"{target} on {self.world_size} ranks: {failure}", file=out)
        for rank in range(self.world_size):
            state, detail = answers.get(rank, ("at work", self._stack(rank).read_text()))
            print(f"--- rank {rank}: {state}", file=out)
            if state != "ok":
                print(str(detail).rstrip(), file=out)
                print("its output:", self._log(rank).read_text()[-2000:].rstrip() or "none", file=out)
        return out.getvalue()

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"

    def _stack(self, rank: int) -> Path:
        return self._folder / f"{rank}.stack"


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for a rank of one machine, whose store listens on `port`."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


@contextlib.contextmanager
def environment(values: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _worker(
    rank: int, world_size: int, pipe: multiprocessing.connection.Connection, variables: dict[str, str], log: str, stack: str
) -> None:
    """The life of one process: wait for a function, call it, send what it returned."""
    os.environ.update(variables)
    redirect_output(log)
    stack_file = open(stack, "w")  # faulthandler keeps it for as long as the process lives
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    faulthandler.enable(file=sys.stderr)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # `shutdown` collects garbage: what was imported before the fork need not be looked through each time.
    gc.freeze()
    while True:
        try:
            target, path, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        os.truncate(log, 0)
        try:
            answer = ("ok", pickle.dumps(_call(target, path, rank, world_size, kwargs)))
        except BaseException:  # SystemExit in a function under test is a failure like any other
            answer = ("raised", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _call(target: str, path: list[str], rank: int, world_size: int, kwargs: dict[str, Any]) -> Any:
    import numpy
    import torch

    from step_megatron.runtime.device import shutdown

    sys.path[:] = list(dict.fromkeys([str(ROOT), str(ROOT / "tests"), *path]))
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        return function(rank, world_size, **kwargs)
    finally:
        shutdown()


def redirect_output(log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def end_with_parent() -> None:
    """End this process when pytest dies: a rank that waits for a message would stay for half an hour."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
