"""Stopping on SIGTERM, SIGINT or SIGHUP (a closed session): finish the step, save, leave.

All ranks stop at the same step, whichever of them was told.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interruption:
    """Catches the signals inside a `with` block; a second signal ends the process at once, as without this class.

    A SIGHUP does not count as the first: who closed the session is not impatient, and shell, terminal and torchrun each send
    signals of their own then. One that is ignored already (`nohup`) stays ignored.

    Args:
        group: a gloo group of all ranks.

    Attributes:
        received: number of the signal that this rank was sent, 0 for none.
        signal_name: of the signal that all ranks have agreed to stop on.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.received = 0
        self._previous: dict[int, object] = {}
        self.signal_name: str | None = None

    def __enter__(self) -> "Interruption":
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS if number not in ignored}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether any rank was told to stop; every rank calls this and gets the same answer."""
        flag = torch.tensor([self.received], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return self.heed(int(flag.item()))

    def heed(self, number: int) -> bool:
        """Take over what all ranks have learnt in another way: whether there is a signal to stop on."""
        if number:
            self.signal_name = signal.Signals(number).name
        return bool(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number != signal.SIGHUP:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
