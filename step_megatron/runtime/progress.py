"""What a run says while it works: loggers that know their rank, and progress lines with rate and time left."""

import logging
import os
import sys
import time
from typing import TextIO

import torch.distributed as dist

# Seconds between lines where the output is a file: enough to see life, not enough to fill a log.
_LINE_INTERVAL = 10.0
_REDRAW_INTERVAL = 0.2
_ROOT = "step_megatron"


def rank() -> int:
    """This process's global rank, also before the process groups exist (torchrun sets RANK)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


class _RankFilter(logging.Filter):
    """Rank 0 says everything, the others warnings and errors, with their rank in front."""

    def filter(self, record: logging.LogRecord) -> bool:
        number = rank()
        record.rank = f"[rank {number}] " if number else ""
        return number == 0 or record.levelno >= logging.WARNING


class _CurrentStderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment, so that captured and redirected output holds the log as well."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def get_logger(name: str) -> logging.Logger:
    """A logger below `step_megatron`; INFO and above of rank 0, WARNING and above of the others, on standard error.

    Args:
        name: `__name__` of a module, or a short name.
    """
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = _CurrentStderr()
        handler.addFilter(_RankFilter())
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(rank)s%(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


class Progress:
    """Progress of a known or unknown amount of work, printed by rank 0.

    On a terminal one line is redrawn; elsewhere a line is printed at most every 10 seconds, and one at the end. Use it as a
    context manager, or call `close()`.

    Args:
        total: amount of work, None when unknown (then there is no time left).
        label: what is being done, in front of every line.
        unit: what is counted, e.g. `clips`.
        stream: standard error when None.
        done: amount that was done before; rate and time left are those of what is done now.
    """

    def __init__(self, total: float | None, label: str, unit: str = "", stream: TextIO | None = None, done: float = 0.0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.done = self._before = float(done)
        self._stream = stream or sys.stderr
        self._redraws = bool(getattr(self._stream, "isatty", lambda: False)())
        self._active = rank() == 0
        self._start = self._printed = time.monotonic()
        self._width = 0
        self._note = ""
        self._closed = False

    def update(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more as done, or less where it is negative, because work has to be done again.

        `note` (e.g. `loss 1.23`) stands at the line's end until the next one.
        """
        self.done += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._printed >= (_REDRAW_INTERVAL if self._redraws else _LINE_INTERVAL):
            self._printed = now
            self._print(self.line(now), last=False)

    def line(self, now: float | None = None) -> str:
        """The line that stands for this moment."""
        elapsed = max((time.monotonic() if now is None else now) - self._start, 1e-9)
        rate = (self.done - self._before) / elapsed
        unit = f" {self.unit}" if self.unit else ""
        parts = [self.label]
        if self.total is None:
            parts.append(f"{_amount(self.done)}{unit}")
        else:
            share = self.done / self.total if self.total else 1.0
            parts.append(f"{_amount(self.done)}/{_amount(self.total)}{unit} {share:4.0%}")
        parts.append(f"{_amount(rate)}{unit}/s")
        if self.total is None or self.done >= self.total:
            parts.append(f"took {_duration(elapsed)}")
        elif rate > 0:
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        return "  ".join(parts + ([self._note] if self._note else []))

    def close(self) -> None:
        """Print the final line; further calls do nothing."""
        if not self._closed:
            self._closed = True
            self._print(self.line(), last=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _print(self, line: str, last: bool) -> None:
        if not self._active:
            return
        try:
            if self._redraws:
                # Spaces wipe what a longer line before this one left.
                self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
                self._width = len(line)
            else:
                self._stream.write(line + "\n")
            self._stream.flush()
        except OSError:
            # The terminal was closed: the work goes on (or saves, when the signal of that arrives) without a display.
            self._active = False


def _amount(value: float) -> str:
    """`12`, `1.5`, `34,567`: three digits that matter, or all the digits of a whole number."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def _duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
