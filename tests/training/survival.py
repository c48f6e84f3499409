"""Runs that are killed: a small run of text, the points at which a rank can be held, and what has to be the same at the end.

`python -m training.survival --kills 25` (in `tests/`) kills runs of several layouts until so many kills have hit, and lets each
go on to its end; the tests use the same functions.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

from support.rank_processes import RankProcesses

# Columns that depend on the clock or the machine, not on the training.
CLOCK = ("time", "per_second", "step_seconds", "memory", "mfu")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp2-distributed-optimizer": ("megatron.ddp={use_distributed_optimizer: true, overlap_grad_reduce: true}",),
    "tp2-sp-fp16": (
        "megatron.transformer={tensor_model_parallel_size: 2, sequence_parallel: true, fp16: true}",
        # Overflows at first, and grows again: the scaler's state is in use.
        "megatron.optimizer={initial_loss_scale: 65536, loss_scale_window: 4, hysteresis: 1, min_loss_scale: 1.0}",
    ),
    "pp2-bf16": (
        "megatron.transformer={pipeline_model_parallel_size: 2, bf16: true}",
        "training.validation_interval=5",
    ),
}


def settings(data: str, run_dir: str, extra: tuple[str, ...] = ()) -> list[str]:
    """16 steps; a checkpoint every 4, a line of metrics every 3, so that lines and checkpoints do not meet."""
    sizes = "num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 2"
    return [
        f"run={{dir: {run_dir}, threads: 1, seed: 3, log_interval: 3, tensorboard: true}}",
        "model={preset: tiny, vocabulary_size: 320, max_positions: 512}",
        "encoder={mels: 80, width: 64, layers: 1, heads: 1, ffn_width: 128}",
        "adaptor.width=64",
        f"tokenizer.path={data}/tokenizer",
        "data={tokens_per_micro_batch: 128, packing_window: 12, quarantine_limit: 0.5}",
        f"data.sources=[{{name: uneven, path: {data}/uneven.jsonl, weight: 2}}, {{name: sums, path: {data}/sums.jsonl}}]",
        f"data.validation=[{{name: held out, path: {data}/sums.jsonl}}]",
        "training={steps: 16, micro_batches_per_step: 2, lr_warmup_steps: 2, save_interval: 4, keep_checkpoints: 2}",
        "training.validation_micro_batches=2",
        f"megatron={{transformer: {{{sizes}}}, optimizer: {{lr: 1e-2, weight_decay: 0.1}}}}",
        *extra,
    ]


def run_rank(
    rank: int, world_size: int, tell: Callable[[str], None] = lambda message: None, *,
    data: str, run_dir: str, extra: tuple[str, ...] = (), hold: dict[int, str] | None = None, how: str = "stay",
    signal_in: tuple[str, str, int] | None = None, poison: tuple[int, ...] = (), drop: tuple[int, ...] = (),
) -> dict:  # fmt: skip
    """Mid-train; returns the stage's summary and `hash`, of everything that this rank trained; a whole run leaves that in a file.

    Args:
        hold: for a rank, the point of `POINTS` at which it says "held" and does not go on.
        how: one of `HOLDS`.
        signal_in: module, function and number of the call before which rank 0 gets a SIGTERM.
        poison: turns (steps in the order in which they are run, from 1) in which the last rank finds a gradient of NaN.
        drop: batches, from 1 in the order of the loader, that are never seen.
    """
    from step_megatron.config import load_config
    from step_megatron.training import midtrain, stage

    train, state = stage.train, [""]

    def train_and_hash(trainer):
        tell("training")
        train(trainer)
        state.append(state_hash(trainer))

    patches = [mock.patch.object(stage, "train", train_and_hash), drawing(rank)]
    if rank in (hold or {}):
        patches += POINTS[hold[rank]](partial(HOLDS[how], tell))
    if signal_in and rank == 0:
        owner, name, number = signal_in
        patches.append(_in_call(owner, name, lambda: os.kill(os.getpid(), signal.SIGTERM), number))
    if poison and rank == world_size - 1:
        patches.append(poisoned(poison))
    if drop:
        patches.append(without_batches(drop))
    for patch in patches:
        patch.start()
    try:
        summary = midtrain.midtrain(load_config(None, settings(data, run_dir, extra)))
    finally:
        for patch in patches:
            patch.stop()
    if not summary["interrupted"]:
        (Path(run_dir) / f"hash_{rank}").write_text(state[-1])
    return summary | {"hash": state[-1]}


def state_hash(trainer, with_random: bool = True) -> str:
    """SHA-256 of this rank's parameters, moments, step counts, loss scale and (unless told otherwise) random state."""
    import torch

    from step_megatron.runtime import seeds
    from step_megatron.runtime.megatron_optimizer import optimizer_parts
    from step_megatron.training.optimizer import settled_parameters

    digest = hashlib.sha256()
    with settled_parameters(trainer.model):
        tensors = [p for chunk in trainer.model for p in chunk.parameters()]
    for part in optimizer_parts(trainer.optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors.append(parameter)
                tensors += [value for _, value in sorted(part.optimizer.state[parameter].items())]
    tensors.append(trainer.optimizer.get_loss_scale())
    random_state = seeds.rng_state()
    if with_random:
        tensors += [random_state["torch"], *(random_state["megatron"][name] for name in sorted(random_state["megatron"]))]
        digest.update(repr((random_state["python"], random_state["numpy"])).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def drawing(rank: int):
    """Every rank draws random numbers in every step, as dropout would: other ones than the other ranks, from every generator."""
    import numpy
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from step_megatron.training import loop

    gradient_norm = loop.gradient_norm

    def norm_and_draw(optimizer):
        for _ in range(rank + 1):
            random.random(), numpy.random.rand(), torch.rand(1)
            with get_cuda_rng_tracker().fork():
                torch.rand(1)
        return gradient_norm(optimizer)

    return mock.patch.object(loop, "gradient_norm", norm_and_draw)


def poisoned(turns: tuple[int, ...]):
    """In these turns one gradient is NaN when the optimizer gets to see it."""
    from step_megatron.training import loop

    step = loop.training_step

    def step_with_poison(trainer):
        prepare = trainer.optimizer.prepare_grads

        def prepare_poisoned():
            if trainer.heartbeat.pulse.turn in turns:
                next(trainer.model[0].parameters()).main_grad.view(-1)[0] = float("nan")
            return prepare()

        with mock.patch.object(trainer.optimizer, "prepare_grads", prepare_poisoned):
            return step(trainer)

    return mock.patch.object(loop, "training_step", step_with_poison)


def without_batches(numbers: tuple[int, ...]):
    """The training loader passes over some of its steps."""
    from step_megatron.training import stage

    count, next_batches = itertools.count(1), stage._next_batches

    def next_of_the_others(loader, on_device, heartbeat):
        while next(count) in numbers:
            loader.next_step()
        return next_batches(loader, on_device, heartbeat)

    return mock.patch.object(stage, "_next_batches", next_of_the_others)


def stay(tell: Callable[[str], None]) -> None:
    """Tell that the point is reached, and stay there until the process is killed."""
    tell("held")
    while True:
        time.sleep(60)


def keep_interpreter(tell: Callable[[str], None]) -> None:
    """The same in C code that does not let any other thread run."""
    tell("held")
    ctypes.PyDLL(None).sleep(1_000_000)


HOLDS = {"stay": stay, "keep_interpreter": keep_interpreter}


def _in_call(owner: str, name: str, hold: Callable[[], None], at: int, choose: Callable[..., bool] = lambda *_: True):
    """Hold before the `at`-th call of `owner.name` that `choose` says yes to."""
    import pkgutil

    place, count = pkgutil.resolve_name(owner), itertools.count(1)
    original = getattr(place, name)

    def held(*args, **kwargs):
        if choose(*args) and next(count) == at:
            hold()
        return original(*args, **kwargs)

    return mock.patch.object(place, name, held)


def _in_quarantine(hold: Callable[[], None]) -> list:
    """Half of a line is written."""

    def torn(path, entry):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry)[:20])
        hold()

    return [mock.patch("step_megatron.data.sources.append_json_line", torn)]


def _in_metrics(hold: Callable[[], None]) -> list:
    """Half of the second line is written."""
    from step_megatron.runtime.metrics import MetricsWriter

    write, count = MetricsWriter.write, itertools.count(1)

    def torn(writer, step, values):
        if next(count) == 2 and writer._file is not None:
            writer._file.write(json.dumps({"step": step, "time": 1.0})[:15])
            writer._file.flush()
            hold()
        write(writer, step, values)

    return [mock.patch.object(MetricsWriter, "write", torn)]


def _is_checkpoint_file(handle: int) -> bool:
    return "/checkpoints/" in os.readlink(f"/proc/self/fd/{handle}")


# Where a rank can be held: a name, and what patches a process so that `hold` is called there.
POINTS: dict[str, Callable[[Callable[[], None]], list]] = {
    "before an update": lambda hold: [_in_call("step_megatron.training.loop", "apply_update", hold, 6)],
    "in the exchange": lambda hold: [_in_call("step_megatron.training.loop", "exchange", hold, 3)],
    "in the plan of the loader": lambda hold: [_in_call("step_megatron.data.loader:MixtureLoader", "_plan", hold, 4)],
    "in a file of a checkpoint": lambda hold: [_in_call("os", "fsync", hold, 2, _is_checkpoint_file)],
    "before latest names a checkpoint": lambda hold: [
        _in_call("os", "replace", hold, 2, lambda source, target: Path(target).name == "latest")
    ],
    "in the quarantine": _in_quarantine,
    "in a line of metrics": _in_metrics,
}
# Points that only the first rank passes.
FIRST_RANK_ONLY = ("before latest names a checkpoint", "in the quarantine", "in a line of metrics")


@dataclass(frozen=True)
class Kill:
    """When and whom: at a point, or after some seconds; one rank or all."""

    ranks: tuple[int, ...]
    point: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"rank {' and '.join(map(str, self.ranks))} {self.point or f'after {self.seconds:.2f} s'}"


def run_once(ranks: RankProcesses, kwargs: dict, kill: Kill | None = None, timeout: float = 300.0) -> tuple[bool, list[int]]:
    """Start all ranks of a run; kill some if asked. Returns whether the kill hit, and every rank's exit status."""
    hold = {kill.ranks[0]: kill.point} if kill and kill.point else None
    ranks.start(run_rank, kwargs | {"hold": hold})
    message = ranks.heard(timeout)
    if kill and kill.point:
        while message is not None and message[1] != "held":
            message = ranks.heard(timeout)
        hit = message is not None
    elif kill:
        ended = ranks.heard(kill.seconds)
        hit = ended is None
    if kill:
        ranks.kill(list(kill.ranks))
    statuses = ranks.join(timeout)
    # A rank that had ended by itself was not hit.
    return bool(kill) and hit and any(statuses[rank] == -9 for rank in kill.ranks), statuses


def run_to_end(ranks: RankProcesses, kwargs: dict, kills: list[Kill]) -> int:
    """Start a run, kill it, start it again, until it has got to its end; returns how many kills hit.

    Raises:
        AssertionError: it does not get to its end though nobody kills it.
    """
    hits = 0
    for kill in kills:
        hit, statuses = run_once(ranks, kwargs, kill)
        hits += hit
        if statuses == [0] * ranks.world_size:
            return hits
    _, statuses = run_once(ranks, kwargs)
    assert statuses == [0] * ranks.world_size, ranks.logs()
    return hits


def remains(run_dir: Path) -> dict:
    """What has to be the same at the end of a run, however it got there."""
    from step_megatron.data.sources import _samples_in
    from step_megatron.runtime.metrics import read_metrics

    lines = [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in read_metrics(run_dir)]
    return {
        "metrics": lines,
        "tensorboard": tensorboard_steps(run_dir / "tensorboard"),
        "hashes": {path.name: path.read_text() for path in sorted(run_dir.glob("hash_*"))},
        "quarantine": sorted(_samples_in(run_dir / "quarantine.jsonl")),
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        "files": sorted(path.name for path in run_dir.iterdir() if path.name != "hangs"),
    }


def tensorboard_steps(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every scalar, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in sorted(events.Tags()["scalars"])
        if not any(word in tag for word in CLOCK)
    }


def random_kills(rng: random.Random, count: int, seconds: float) -> list[Kill]:
    """Half at the points, half at any moment of the `seconds` that a run takes; one rank, or both."""
    points = rng.sample(list(POINTS), len(POINTS)) * count
    kills = []
    for number in range(count):
        whole = rng.random() < 0.3
        if number % 2:
            kills.append(Kill((0, 1) if whole else (rng.randrange(2),), seconds=rng.uniform(0, seconds)))
        else:
            first = 0 if points[number] in FIRST_RANK_ONLY else rng.randrange(2)
            kills.append(Kill((first, 1 - first) if whole else (first,), point=points[number]))
    return kills


def campaign(kills: int, seed: int, say: Callable[[str], None] = print) -> dict[str, int]:
    """Kill runs of every layout in turn until `kills` have hit; each run's end is held against that of one left in peace.

    Raises:
        AssertionError: a run that was killed ends otherwise.
    """
    from training.toy_run import write_text

    rng, hits, runs = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="survival-") as place, RankProcesses(2, Path(place)) as ranks:
        folder = Path(place)
        (folder / "data").mkdir()
        write_text(folder / "data")
        whole: dict[str, tuple[dict, float]] = {}
        while hits < kills:
            layout = list(LAYOUTS)[runs % len(LAYOUTS)]
            kwargs = {"data": str(folder / "data"), "extra": LAYOUTS[layout]}
            if layout not in whole:
                started = time.monotonic()
                run_to_end(ranks, kwargs | {"run_dir": str(folder / layout)}, [])
                whole[layout] = remains(folder / layout), time.monotonic() - started
            runs += 1
            run_dir = folder / f"{layout}-{runs}"
            plan = random_kills(rng, min(5, kills - hits), whole[layout][1])
            say(f"{layout}: {'; '.join(map(str, plan))}")
            hits += run_to_end(ranks, kwargs | {"run_dir": str(run_dir)}, plan)
            end = remains(run_dir)
            for name, value in whole[layout][0].items():
                assert end[name] == value, (layout, name, end[name], value)
            say(f"  the same in everything; {hits} of {kills} kills have hit")
    return {"kills": hits, "runs": runs, "layouts": len(whole)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(campaign(options.kills, options.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
