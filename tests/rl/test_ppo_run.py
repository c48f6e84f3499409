"""Whole runs of PPO: layouts, offloading and stops change nothing; rewards are learnt; what is wrong ends with a message."""

from pathlib import Path

import pytest
from toy_ppo import run, write_prompts
from training.toy_run import write_data

from step_megatron.runtime.metrics import read_metrics

# What an iteration ends with that does not depend on the clock.
CLOCK = ("seconds", "share/", "memory_gib/", "seconds/", "time", "run_dir", "checkpoint", "rollout/dlogp", "rollout/ratio")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    write_data(folder)
    write_prompts(folder)
    return folder


def lines(run_dir: Path) -> list[dict]:
    """The run's metrics without those that depend on the clock."""
    return [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in read_metrics(run_dir)]


LAYOUTS = {
    "tp2": ("megatron.transformer.tensor_model_parallel_size=2",),
    "tp2-sp": ("megatron.transformer={tensor_model_parallel_size: 2, sequence_parallel: true}",),
    "dp2": (),
    "dp2-distributed": ("megatron.optimizer.use_distributed_optimizer=true", "megatron.ddp.overlap_grad_reduce=true"),
    "cp2": ("megatron.transformer.context_parallel_size=2",),
}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, worker_pool):
    """The metrics of one process."""
    folder = tmp_path_factory.mktemp("alone")
    worker_pool(1).run(run, {"data": str(data), "run_dir": str(folder)})
    return lines(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_that_of_one_process(data, alone, tmp_path, worker_pool, layout):
    worker_pool(2).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": LAYOUTS[layout]})
    for ours, theirs in zip(lines(tmp_path), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5, nan_ok=True)
