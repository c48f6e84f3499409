"""A run that goes on under other circumstances: what cannot be is said before anything of the run is touched."""

import hashlib
import re
import shutil

import pytest
from training.survival import remains, run_rank

SHORT = ("training.steps=8", "training.save_interval=4", "run.log_interval=1", "run.tensorboard=false")
STEP = ("step_megatron.training.loop", "training_step", 6)


@pytest.fixture(scope="module")
def stopped(worker_pool, data, tmp_path_factory):
    """A run of two replicas, told to stop in step 6 of 8."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    kwargs = {"data": data, "run_dir": str(run_dir), "extra": SHORT, "signal_in": STEP}
    assert worker_pool(2).run(run_rank, kwargs)[0]["steps"] == 6
    return run_dir


def contents(folder) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def refused(rank, world_size, **kwargs):
    from step_megatron.errors import UserError

    try:
        run_rank(rank, world_size, **kwargs)
    except (UserError, ValueError) as error:
        return str(error)
    return "it went on"


@pytest.mark.parametrize(
    ("processes", "setting", "message"),
    [
        (1, "megatron.transformer.tensor_model_parallel_size=2", "1 processes cannot be divided into replicas of 2"),
        (2, "training.micro_batches_per_step=3", "micro_batches_per_step is 3; make it a multiple of 2 data-parallel ranks"),
        (1, "run.seed=4", "has sources .* and seed 3, this run has .* and 4; restore data.sources and run.seed"),
        (1, "data.sources=[{name: sums, path: DATA/sums.jsonl}]", "restore data.sources"),
        (1, "megatron.transformer.num_layers=4", "num_layers is 4, but this run was made with 2.*restore the setting"),
        (1, "training.anomaly.window=0", "training.anomaly.window=0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_lost(processes, setting, message, worker_pool, data, stopped, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    before = contents(run_dir)
    kwargs = {"data": data, "run_dir": str(run_dir), "extra": (*SHORT, setting.replace("DATA", data))}
    for said in worker_pool(processes).run(refused, kwargs):
        assert re.search(message, said), said
    assert contents(run_dir) == before


def test_another_number_of_ranks_goes_on_and_is_said(worker_pool, data, stopped, tmp_path, capfd):
    run_dir, reference = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(stopped, run_dir)
    run_rank(0, 1, data=data, run_dir=str(run_dir), extra=SHORT)
    said = capfd.readouterr().err
    assert "going on in the layout {'tp': 1, 'pp': 1, 'cp': 1, 'dp': 1}, it was {'tp': 1, 'pp': 1, 'cp': 1, 'dp': 2}" in said
    worker_pool(2).run(run_rank, {"data": data, "run_dir": str(reference), "extra": SHORT})
    for line, other in zip(remains(run_dir)["metrics"], remains(reference)["metrics"], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert "going on in the layout" not in capfd.readouterr().err
