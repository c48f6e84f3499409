"""What the ranks of a job tell each other: small host values, over a gloo group; in one process nothing has to be said."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """All ranks of the job; every call is collective.

    Args:
        group: a gloo group of all ranks; None for the default group, whatever its backend.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.rank = 0 if self._alone else dist.get_rank()
        self.size = 1 if self._alone else dist.get_world_size()

    @classmethod
    def apart(cls, timeout: datetime.timedelta) -> "Ranks":
        """With a gloo group of their own: a thread may use it while the training step uses the others."""
        alone = dist.get_world_size() == 1
        return cls(None if alone else dist.new_group(backend="gloo", timeout=timeout))

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first rank, which alone calls it; `work` must not raise."""
        answer = [work() if self.rank == 0 else None]
        if not self._alone:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        return answer[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on the first rank; nothing on the others."""
        if self._alone:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def gather_all(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self._alone:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
