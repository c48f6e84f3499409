"""What a checkpoint costs the training: seconds in `Checkpoints.save`, and how much slower the steps are while it is written.

One process, `smol-135m` (or `--preset`), about 4,096 tokens a step, features of the clips at hand: nothing in the step but the
decoder's and the adaptor's own work. A round is one step alone; a save that goes on beside two steps; and a save that the
training stops for. The checkpoints go into a folder that is deleted afterwards, synced to its disk.
"""

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from step_megatron.benchmarks import train_step
from step_megatron.checkpoint.directory import Retention, latest_checkpoint
from step_megatron.checkpoint.saving import Checkpoints
from step_megatron.config import load_config
from step_megatron.model.encoder import build_encoder
from step_megatron.runtime.device import initialize, shutdown

# About 63 tokens each.
_SAMPLES = 65
_MICRO_BATCH = 2048
_FOLLOWING = 2
# The share of a step that a save may take at `smol-135m` and 4k tokens a step.
_LIMIT = 0.05


@dataclass(frozen=True)
class Round:
    """Seconds: a step alone; a save beside the training, the steps after it, what was still to be waited for; a save alone."""

    step: float
    save: float
    following: float
    wait: float
    synchronous: float

    @property
    def shares(self) -> dict[str, float]:
        """Of a step: in an asynchronous and in a synchronous save, and by how much one of the following steps is longer."""
        return {
            "asynchronous": self.save / self.step,
            "synchronous": self.synchronous / self.step,
            "slowdown": self.following / (_FOLLOWING * self.step) - 1,
        }


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (samples of a step, None for 65: 4k tokens), `preset` (None for `smol-135m`), `out`
            (where the folder is made, None for `runs/bench`).

    Returns:
        `{"name", "ratio", "low", "high", "limit", ...}`: share of a step that an asynchronous save takes (median, lowest and
        highest round), the same for a synchronous one and for the slowdown of a step beside the writing, the first save (which
        allocates the host memory), and the checkpoint's bytes.
    """
    preset = options.preset or "smol-135m"
    overrides = [*train_step.OVERRIDES, "run={device: cpu, seed: 1, threads: 0}", f"model.preset={preset}"]
    config = load_config(None, overrides)
    samples = train_step.make_samples(options.clips or _SAMPLES)
    runtime = initialize(config)
    try:
        ours = train_step.Ours(config, build_encoder(config.encoder, seed=1), samples, runtime, _MICRO_BATCH)
        place = options.out or Path("runs/bench")
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=place) as folder:
            first, rounds, size = _measure(ours, Path(folder), options.repeats)
    finally:
        shutdown()
    tokens = sum(sum(batch.segment_lengths) for batch in ours.micro_batches)
    return _report(preset, tokens, runtime.threads, size, first, rounds)


def _measure(ours: train_step.Ours, folder: Path, repeats: int) -> tuple[float, list[Round], int]:
    """Seconds of the first save, the rounds, and the bytes of a checkpoint."""
    state, keep = ours.state, Retention(newest=1)
    place = (state.model, state.optimizer, state.scheduler, {})
    with (
        closing(Checkpoints(folder / "beside", keep)) as beside,
        closing(Checkpoints(folder / "alone", keep, asynchronous=False)) as alone,
    ):
        # The first update makes the optimizer's state.
        ours.train_cached()
        first = _seconds(lambda: beside.save(0, *place))
        beside.wait()
        alone.save(0, *place)
        rounds = []
        for number in range(1, repeats + 1):
            step = _seconds(ours.train_cached)
            save = _seconds(lambda number=number: beside.save(number, *place))
            following = sum(_seconds(ours.train_cached) for _ in range(_FOLLOWING))
            wait = _seconds(beside.wait)
            synchronous = _seconds(lambda number=number: alone.save(number, *place))
            alone.wait()
            rounds.append(Round(step, save, following, wait, synchronous))
        size = sum(file.stat().st_size for file in latest_checkpoint(folder / "beside").iterdir())
    return first, rounds, size


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _report(preset: str, tokens: int, threads: int, size: int, first: float, rounds: list[Round]) -> dict:
    step = statistics.median(each.step for each in rounds)
    print(f"{preset}, {tokens} tokens a step of {step:.2f} s, {threads} threads, checkpoints of {size / 1e9:.2f} GB")
    result = {"name": "checkpoint", "limit": _LIMIT, "preset": preset, "tokens": tokens, "threads": threads, "bytes": size}
    result |= {"step_seconds": step, "first_save_seconds": first, "first_share": first / step}
    names = {
        "asynchronous": ("", "of a step in an asynchronous save"),
        "synchronous": ("_synchronous", "of a step in a synchronous save"),
        "slowdown": ("_slowdown", f"longer each of the {_FOLLOWING} steps beside the writing"),
    }
    for name, (suffix, text) in names.items():
        shares = [each.shares[name] for each in rounds]
        middle, low, high = statistics.median(shares), min(shares), max(shares)
        print(f"  {middle:7.2%} ({low:.2%} to {high:.2%}) {text}")
        result |= {f"ratio{suffix}": middle, f"low{suffix}": low, f"high{suffix}": high}
    print(f"  {first / step:7.2%} of a step in the first save, which allocates the host memory")
    return result | {"wait_seconds": statistics.median(each.wait for each in rounds)}
