"""The time that passes, and the time that this process computes, which other work on the machine disturbs less."""

import time


class Clock:
    """Time since it was made."""

    def __init__(self):
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds, and seconds of all threads."""
        return time.perf_counter() - self._started[0], time.process_time() - self._started[1]
