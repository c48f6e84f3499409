"""Several models on one device: what a phase needs is there, the rest waits in host memory.

A `Resident` owns storages: the weights of a model, an optimizer's state, gradient buffers. Asleep, its bytes are in host memory
(pinned for a GPU, allocated once and kept) and its storages are empty; awake, they are back in the *same* storages, so every view
of them, Megatron's flat buffers and the parameters in them included, is valid again. What need not outlive a phase (gradients)
sleeps without a copy; a key-value cache is given back.

Entering a phase first puts to sleep what it does not need, then wakes what it does, weights before all else, so that old and new
residents never add up. Caches come last: an engine allocates its own when it generates.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from step_megatron.generation.interface import RolloutEngine
from step_megatron.runtime.metrics import peak_memory_bytes


class Sleeper(Protocol):
    """What lives on the device in some phases only."""

    @property
    def bytes(self) -> int:
        """Device memory that it holds now."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class Resident:
    """Tensors that sleep together.

    Args:
        tensors: gives them, again each time: an optimizer makes its state at the first step.
        keeps: whether their values outlive the sleep; else they wake as zeros.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], keeps: bool = True):
        self._tensors, self._keeps = tensors, keeps
        self._asleep: list[tuple[torch.UntypedStorage, int, torch.Tensor | None]] = []
        self._spare: dict[int, list[torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        return 0 if self._asleep else sum(storage.nbytes() for storage in self._storages())

    @property
    def host_bytes(self) -> int:
        """Host memory that it keeps for its sleep."""
        spare = sum(len(buffers) * size for size, buffers in self._spare.items())
        return spare + sum(size for _, size, host in self._asleep if host is not None)

    def sleep(self) -> None:
        """Free the device memory; does nothing where it sleeps already."""
        if self._asleep:
            return
        for storage in self._storages():
            size = storage.nbytes()
            host = self._buffer(size, storage.device) if self._keeps else None
            if host is not None:
                host.copy_(_bytes_of(storage))
            self._asleep.append((storage, size, host))
        for storage, _, _ in self._asleep:
            storage.resize_(0)

    def wake(self) -> None:
        """Bring everything back; does nothing where it is awake."""
        for storage, size, host in self._asleep:
            storage.resize_(size)
            if host is None:
                _bytes_of(storage).zero_()
            else:
                _bytes_of(storage).copy_(host, non_blocking=True)
                self._spare.setdefault(size, []).append(host)
        self._asleep = []

    def _storages(self) -> list[torch.UntypedStorage]:
        found = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found.setdefault(storage._cdata, storage)
        return list(found.values())

    def _buffer(self, size: int, device: torch.device) -> torch.Tensor:
        spare = self._spare.get(size)
        return spare.pop() if spare else torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Cache:
    """The key-value cache of an engine: given back, not copied."""

    def __init__(self, engine: RolloutEngine):
        self._engine = engine

    @property
    def bytes(self) -> int:
        return self._engine.cache_bytes

    def sleep(self) -> None:
        self._engine.release_cache()

    def wake(self) -> None:
        """Nothing: the engine allocates it when it first generates, after the weights have come."""


class Colocation:
    """Who is on the device in which phase, and what that took.

    Args:
        residents: by name, in the order in which they wake.
        needs: names of the residents of every phase.
        offloads: whether the others sleep.
        trace: a file of Chrome's trace format (chrome://tracing, Perfetto) that phases are appended to.
        rank: of this process, the trace's process id.
    """

    def __init__(
        self,
        residents: Mapping[str, Sleeper],
        needs: Mapping[str, Iterable[str]],
        offloads: bool,
        device: torch.device,
        trace: Path | None = None,
        rank: int = 0,
    ):
        self.residents, self._offloads, self._device, self._trace, self._rank = dict(residents), offloads, device, trace, rank
        self._needs = {phase: frozenset(names) & residents.keys() for phase, names in needs.items()}
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """Device memory of all residents now."""
        return sum(resident.bytes for resident in self.residents.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the phase needs is on the device inside; its time counts the moving."""
        started = time.perf_counter()
        if self._offloads:
            self._move(self._needs[name])
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            ended = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + ended - started
            # On a CPU the process's memory says little: what the residents hold counts, before any cache is given back.
            peak = peak_memory_bytes(self._device) if self._device.type == "cuda" else self.bytes
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
            self._write(name, started, ended)

    def wake_all(self) -> None:
        """Everything back on the device, to be saved."""
        self._move(self.residents.keys())

    def flush(self) -> dict[str, float]:
        """`seconds/PHASE`, `share/PHASE` and `memory_gib/PHASE` since the last call."""
        whole = sum(self.seconds.values()) or 1.0
        values = {f"seconds/{name}": seconds for name, seconds in self.seconds.items()}
        values |= {f"share/{name}": seconds / whole for name, seconds in self.seconds.items()}
        values |= {f"memory_gib/{name}": peak / 2**30 for name, peak in self.peaks.items()}
        self.seconds, self.peaks = {}, {}
        return values

    def _move(self, needed: Iterable[str]) -> None:
        needed = set(needed)
        for name, resident in self.residents.items():
            if name not in needed:
                resident.sleep()
        for name, resident in self.residents.items():
            if name in needed:
                resident.wake()
        if self._device.type == "cuda":
            # Copies come from pinned memory without waiting: nothing may write there before they are done.
            torch.cuda.current_stream(self._device).synchronize()

    def _write(self, name: str, started: float, ended: float) -> None:
        if self._trace is None:
            return
        event = {"name": name, "ph": "X", "ts": started * 1e6, "dur": (ended - started) * 1e6, "pid": self._rank, "tid": 0}
        event["args"] = {"resident_gib": round(self.bytes / 2**30, 4)}
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        # The format allows the closing bracket to be left out, so that events can be appended.
        with self._trace.open("a", encoding="utf-8") as file:
            file.write(("" if file.tell() else "[\n") + json.dumps(event) + ",\n")


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
