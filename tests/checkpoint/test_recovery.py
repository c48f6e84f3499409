"""Where a run goes on when its newest checkpoint is damaged: from the newest whole one, loudly, the same on all ranks."""

import logging
import shutil

import pytest
from checkpoint.test_seal import flip

from step_megatron.checkpoint.directory import CheckpointError, checkpoint_at, checkpoint_root, latest_checkpoint, point_to
from step_megatron.checkpoint.recovery import newest_good
from step_megatron.checkpoint.seal import write_seal, write_sealed


@pytest.fixture
def run_dir(tmp_path):
    """A run with whole checkpoints of steps 1, 2 and 3; `latest` names the last."""
    for step in (1, 2, 3):
        place = checkpoint_at(checkpoint_root(tmp_path), step)
        place.mkdir(parents=True)
        write_seal(place, {name: write_sealed(place / name, f"{step} {name}".encode()) for name in ("a", "b")}, {"step": step})
        point_to(place)
    return tmp_path


def resume(rank, world_size, *, run_dir, refuse=False) -> str:
    """The name of the checkpoint that this rank would go on from, or what it says."""
    from parallel.layouts import OPTIMIZERS, small_config

    from step_megatron.runtime.device import initialize

    initialize(small_config({}, OPTIMIZERS["sgd"]))
    try:
        return newest_good(run_dir, refuse).name
    except CheckpointError as error:
        return str(error)


def test_all_ranks_go_on_from_the_newest_that_is_whole(worker_pool, run_dir, caplog):
    root = checkpoint_root(run_dir)
    flip(checkpoint_at(root, 3) / "b")
    (checkpoint_at(root, 2) / "a").unlink()
    refused = worker_pool(2).run(resume, {"run_dir": str(run_dir), "refuse": True})
    assert refused[0] == refused[1] and "step_00000003 is not whole: b is damaged" in refused[0]
    assert latest_checkpoint(run_dir).name == "step_00000003"
    assert worker_pool(2).run(resume, {"run_dir": str(run_dir)}) == ["step_00000001"] * 2
    assert latest_checkpoint(run_dir).name == "step_00000001"
    kept = {path.name: (path / "damaged.txt").read_text() for path in root.glob("damaged_*")}
    assert kept.keys() == {"damaged_step_00000002", "damaged_step_00000003"} and "a is missing" in kept["damaged_step_00000002"]
    # What is set aside is not looked at again.
    assert newest_good(run_dir).name == "step_00000001" and not caplog.records


def test_a_fall_back_is_said_loudly(run_dir, caplog):
    shutil.rmtree(checkpoint_at(checkpoint_root(run_dir), 2))
    flip(checkpoint_at(checkpoint_root(run_dir), 3) / "a")
    assert newest_good(run_dir).name == "step_00000001"
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "step_00000003 is damaged: a is damaged" in errors[0] and "damaged_step_00000003" in errors[0]


def test_a_run_never_starts_anew_over_what_it_has(run_dir):
    for step in (1, 2, 3):
        (checkpoint_at(checkpoint_root(run_dir), step) / "seal.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the checkpoints here is whole"):
            newest_good(run_dir)


@pytest.mark.parametrize("pointer", [None, "step_00000009\n", "nonsense/..\n"])
def test_a_pointer_of_no_use_is_repaired(pointer, run_dir):
    latest = checkpoint_root(run_dir) / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_text(pointer)
    with pytest.raises(CheckpointError, match="latest: .*; write the name of the checkpoint to go on from"):
        newest_good(run_dir, refuse_damaged=True)
    assert newest_good(run_dir).name == "step_00000003" and latest_checkpoint(run_dir).name == "step_00000003"


@pytest.mark.parametrize("damaged", [False, True])
def test_who_goes_back_to_an_older_one_gets_that_or_one_before(damaged, run_dir):
    root = checkpoint_root(run_dir)
    point_to(checkpoint_at(root, 2))
    if damaged:
        flip(checkpoint_at(root, 2) / "a")
    assert newest_good(run_dir).name == ("step_00000001" if damaged else "step_00000002")
    assert checkpoint_at(root, 3).is_dir()


def test_a_new_run_has_nothing_to_go_on_from(tmp_path):
    assert newest_good(tmp_path) is None and not checkpoint_root(tmp_path).exists()
    (checkpoint_root(tmp_path) / ".step_00000001.partial").mkdir(parents=True)
    assert newest_good(tmp_path) is None and not list(checkpoint_root(tmp_path).iterdir())
