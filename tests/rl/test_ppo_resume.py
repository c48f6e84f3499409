"""A run that is killed in any phase ends as if it had not been: the same bits, nothing generated twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rl.toy_ppo import EXACT, run, write_prompts
from training.toy_run import write_data

from step_megatron.rl.journal import Journal
from step_megatron.runtime.metrics import read_metrics

TESTS = Path(__file__).resolve().parents[1]
CLOCK = ("time", "seconds/", "share/", "memory_gib/")
SAMPLES = 3 * 4 * 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_data(folder)
    write_prompts(folder)
    return folder


def run_counting(rank: int, world_size: int, *, data: str, run_dir: str, extra: tuple[str, ...] = EXACT) -> int:
    """Run, or go on; how many samples were generated."""
    from unittest import mock

    written = []
    write = Journal.write

    def counted(self, key, value):
        written.append(key)
        write(self, key, value)

    with mock.patch.object(Journal, "write", counted):
        run(rank, world_size, data=data, run_dir=run_dir, extra=extra)
    return len(written)


def lines(run_dir: Path) -> list[str]:
    return [repr({name: v for name, v in line.items() if not name.startswith(CLOCK)}) for line in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, worker_pool):
    """Metrics of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    (generated,) = worker_pool(1).run(run_counting, {"data": str(data), "run_dir": str(folder)})
    assert generated == SAMPLES
    return lines(folder)


def run_until_killed(data: Path, run_dir: Path, point: str, number: int, *extra: str) -> None:
    command = [sys.executable, "-m", "rl.killed_ppo", str(data), str(run_dir), point, str(number), *extra]
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr


# In the second of three iterations (8 samples, 16 answers, 4 optimizer steps of each model); a checkpoint after every one.
@pytest.mark.parametrize(
    ("point", "number", "generated"), [("generate", 13, 13), ("judge", 12, 16), ("train", 11, 16), ("save", 2, 16)]
)
def test_a_killed_run_goes_on_with_the_same_bits_and_generates_nothing_twice(
    data, whole, tmp_path, worker_pool, point, number, generated
):
    run_until_killed(data, tmp_path, point, number)
    assert 1 <= len(lines(tmp_path)) < 3
    (more,) = worker_pool(1).run(run_counting, {"data": str(data), "run_dir": str(tmp_path)})
    assert lines(tmp_path) == whole
    # Judging overlaps generation: its kill comes at some sample.
    assert more == SAMPLES - generated if point != "judge" else SAMPLES - 16 <= more <= SAMPLES - 8


@pytest.mark.parametrize(
    ("change", "generated"),
    # Another learning rate leaves the first iteration's samples as they are; another temperature does not.
    [("megatron.optimizer.lr=2e-3", SAMPLES - 8), ("rl.rollout.temperature=0.8", SAMPLES)],
)
def test_what_other_settings_would_not_have_made_is_made_again(data, tmp_path, worker_pool, change, generated):
    seldom = "training.save_interval=5"
    run_until_killed(data, tmp_path, "train", 11, seldom)
    arguments = {"data": str(data), "run_dir": str(tmp_path), "extra": (*EXACT, seldom, change)}
    (more,) = worker_pool(1).run(run_counting, arguments)
    assert more == generated


def test_a_run_of_two_ranks_goes_on_from_its_checkpoint(data, tmp_path, worker_pool):
    extra = (*EXACT, "megatron.optimizer.use_distributed_optimizer=true")
    for name, parts in (("whole", (3,)), ("parted", (1, 2, 3))):
        for iterations in parts:
            # The learning rate is constant: a run may be made longer.
            arguments = {"data": str(data), "run_dir": str(tmp_path / name), "extra": (*extra, f"rl.iterations={iterations}")}
            worker_pool(2).run(run_counting, arguments)
    assert lines(tmp_path / "parted") == lines(tmp_path / "whole")


def test_what_a_complete_checkpoint_holds_is_forgotten(data, tmp_path, worker_pool):
    worker_pool(1).run(run_counting, {"data": str(data), "run_dir": str(tmp_path)})
    assert not list((tmp_path / "iterations").glob("*"))
    assert len(list((tmp_path / "rollouts").glob("*.jsonl"))) == 3
