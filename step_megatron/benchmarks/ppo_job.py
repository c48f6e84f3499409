"""What an iteration of the PPO benchmark is, and how a contestant is driven; ours and the peers share it, so it needs no package.

A contestant is a program `python -m MODULE JOB.json`. For each line of its standard input it does one iteration and writes one
JSON line (`Report`); it ends with its input. Whatever else it prints goes to standard error.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_megatron.benchmarks.clock import Clock

_MIB = 2**20


@dataclass(frozen=True)
class Job:
    """An iteration.

    Attributes:
        algorithm: `ppo`, with a critic of its own, `shared`, with one on the policy's trunk, or `rloo`, leave-one-out.
        folder: `policy/` has the weights in Hugging Face's layout, `tokenizer/` and `prompts-COUNT.jsonl` are for ours; the
            rest is for the contestants to write into.
        prompts: token ids of each, as the template renders it.
        samples: replies to each prompt.
        pad, end: ids that fill up a batch, and that end a reply.
        token_scores: of every id; a reply's reward is the mean over its tokens.
        new_tokens, epochs, mini_batches, kl, gae_lambda, learning_rate, threads: as they are called everywhere.
    """

    algorithm: str
    folder: str
    prompts: list[list[int]]
    samples: int
    pad: int
    end: int
    token_scores: list[float]
    new_tokens: int = 64
    epochs: int = 4
    mini_batches: int = 4
    kl: float = 0.05
    gae_lambda: float = 0.95
    learning_rate: float = 1e-6
    threads: int = 2

    @property
    def replies(self) -> int:
        return len(self.prompts) * self.samples

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> "Job":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Report:
    """What an iteration came to.

    Attributes:
        seconds: of all of it; cpu_seconds: of all threads; phases: of its parts, `other` included.
        reward: mean of the replies.
        start, peak: MiB, resident when training began, and at most until now.
    """

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    reward: float
    start: float
    peak: float


class Pace:
    """The contestant's side: waits for a line, then counts the time of the iteration's phases."""

    def __init__(self):
        # Standard output is for reports alone.
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._phases: Counter[str] = Counter()
        self._start_mib = 0.0
        self.rewards: list[float] = []

    def timed(self, name: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted under a name, or under what `name` says of the positional arguments."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._phases[name if isinstance(name, str) else name(*args)] += time.perf_counter() - start

        return call

    def wait(self) -> None:
        """Until the next iteration is asked for.

        Raises:
            SystemExit: none is.
        """
        self._start_mib = self._start_mib or _resident()
        if not sys.stdin.readline():
            raise SystemExit
        self._phases.clear()
        self.rewards.clear()
        self._clock = Clock()

    def report(self, phases: dict[str, float] | None = None) -> None:
        """The iteration has ended; `phases` where they were not counted here."""
        (seconds, cpu_seconds), phases = self._clock.read(), dict(self._phases if phases is None else phases)
        phases["other"] = seconds - sum(phases.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB
        reward = sum(self.rewards) / max(1, len(self.rewards))
        report = Report(seconds, cpu_seconds, phases, reward, self._start_mib, peak)
        print(json.dumps(dataclasses.asdict(report)), file=self._channel, flush=True)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / _MIB
