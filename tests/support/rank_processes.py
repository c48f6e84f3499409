"""The ranks of one run as processes of their own, to be killed: forked from the pools' server, which has imported everything.

with RankProcesses(2, folder) as ranks:
    ranks.start(function, {"run_dir": ...})       # function(rank, world_size, tell, **kwargs), importable as for a pool
    ranks.heard(timeout)                          # (rank, message) of the next `tell(message)`, None when all have ended
    ranks.kill([1])                               # kill -9
    ranks.join()                                  # exit status of every rank; 0 where the function returned
"""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from support.worker_pool import ONE_THREAD, PRELOAD, end_with_parent, environment, redirect_output, torchrun_variables


class RankProcesses:
    """`world_size` processes that form one job; logs are `folder/RANK.log`."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self.folder = world_size, folder
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def start(self, function: Callable, kwargs: dict[str, Any]) -> None:
        """Start the ranks; those of a call before have to have ended."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        # Held here, as torchrun's agent holds it: it outlives every rank.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            variables = torchrun_variables(rank, self.world_size, self._store.port)
            target = (function.__module__, function.__qualname__)
            arguments = (rank, self.world_size, theirs, variables, str(self.log(rank)), target, list(sys.path), kwargs)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            with environment(ONE_THREAD):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def heard(self, timeout: float) -> tuple[int, str] | None:
        """The next message of some rank; None when no rank is left that could send one, or after `timeout` seconds."""
        until = time.monotonic() + timeout
        open_pipes = dict(zip(self._pipes, range(self.world_size), strict=True))
        while open_pipes:
            for pipe in multiprocessing.connection.wait(list(open_pipes), max(0.0, until - time.monotonic())):
                try:
                    return open_pipes[pipe], pipe.recv()
                except (EOFError, ConnectionResetError):
                    del open_pipes[pipe]
            if time.monotonic() > until:
                break
        return None

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._processes[rank].kill()

    def signal(self, rank: int, number: int = signal.SIGTERM) -> None:
        os.kill(self._processes[rank].pid, number)

    def join(self, timeout: float = 120.0) -> list[int]:
        """Wait for all ranks; whoever is left after `timeout` seconds is killed, as torchrun would."""
        until = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self._processes]

    def join_one(self, rank: int, timeout: float = 120.0) -> int | None:
        """Wait for one rank; its exit status, None if it has not left."""
        self._processes[rank].join(timeout)
        return self._processes[rank].exitcode

    def log(self, rank: int) -> Path:
        return self.folder / f"{rank}.log"

    def logs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.log(rank).read_text()[-3000:]}" for rank in range(self.world_size))

    def __enter__(self) -> "RankProcesses":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill(list(range(len(self._processes))))
        self.join()
        for pipe in self._pipes:
            pipe.close()


def _rank(
    rank: int,
    world_size: int,
    pipe: multiprocessing.connection.Connection,
    variables: dict[str, str],
    log: str,
    target: tuple[str, str],
    path: list[str],
    kwargs: dict[str, Any],
) -> None:
    os.environ.update(variables)
    redirect_output(log)
    sys.path[:] = path
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        module, name = target
        getattr(importlib.import_module(module), name)(rank, world_size, pipe.send, **kwargs)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Threads of a process group that has failed are not waited for.
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
