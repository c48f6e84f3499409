"""Saving beside the training: what is written is the state at the save, failures lose nothing, a crash leaves a whole one."""

import contextlib
import errno
import os
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checkpoint.test_checkpoint_layouts import DISTRIBUTED, PP2, TP2, same
from parallel import layouts

from step_megatron.checkpoint import directory, saving, seal, writing
from step_megatron.checkpoint.directory import CheckpointError, Retention, checkpoint_at, checkpoint_root, latest_checkpoint
from step_megatron.runtime.agreement import Ranks


def train_and_save_held(rank, world_size, **kwargs) -> dict:
    """`train_and_save`, where nothing is written before the step after the save is over."""
    stepped, write, wait = threading.Event(), saving.write_items, saving.Checkpoints.wait

    def held(*arguments):
        assert stepped.wait(300)
        return write(*arguments)

    def release(checkpoints):
        stepped.set()
        wait(checkpoints)

    with mock.patch.object(saving, "write_items", held), mock.patch.object(saving.Checkpoints, "wait", release):
        return layouts.train_and_save(rank, world_size, **kwargs)


OVERLAP = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(("processes", "transformer", "ddp"), [(1, {}, {}), (2, {}, OVERLAP), (2, PP2 | {"bf16": True}, {})])
def test_what_is_written_late_is_the_state_at_the_save(processes, transformer, ddp, worker_pool, tmp_path):
    kwargs = {"transformer": transformer, "optimizer": "adam", "ddp": ddp, "run_dir": str(tmp_path)}
    written = worker_pool(processes).run(train_and_save_held, kwargs | {"steps": 1})[0]
    resumed = worker_pool(processes).run(layouts.load_and_train, kwargs)[0]
    assert not same(written["saved"], written["after"])
    assert same(resumed["saved"], written["saved"]) and same(resumed["after"], written["after"])


def test_beside_the_training_or_not_the_same_files_are_written(worker_pool, tmp_path):
    files = {}
    for asynchronous in (True, False):
        run_dir = tmp_path / str(asynchronous)
        kwargs = {"transformer": {}, "optimizer": "adam", "steps": 1, "run_dir": str(run_dir), "asynchronous": asynchronous}
        worker_pool(1).run(layouts.train_and_save, kwargs)
        files[asynchronous] = {path.name: path.read_bytes() for path in latest_checkpoint(run_dir).iterdir()}
    assert files[True] == files[False]
    assert {"seal.json", ".metadata", "common.pt", "metadata.json", "__0_0.distcp"} == files[True].keys()


def test_host_memory_is_allocated_once():
    def items(scale):
        return [(SimpleNamespace(index=name), scale * torch.ones(shape)) for name, shape in (("a", (3, 5)), ("b", ()), ("c", 7))]

    copies = writing.HostCopies()
    first, second = copies.of(items(1)), copies.of(items(2))
    assert [value.data_ptr() for _, value in first] == [value.data_ptr() for _, value in second]
    assert all(torch.equal(value, expected) for (_, value), (_, expected) in zip(second, items(2), strict=True))
    original = items(3)
    taken = copies.of(original)
    original[0][1].zero_()
    assert taken[0][1].eq(3).all()


def test_long_files_are_split_and_read_back(worker_pool, tmp_path):
    kwargs = {"transformer": {}, "optimizer": "adam", "run_dir": str(tmp_path)}
    written = worker_pool(1).run(save_in_small_files, kwargs | {"steps": 1})[0]
    assert len(list(latest_checkpoint(tmp_path).glob("*.distcp"))) > 3
    assert same(worker_pool(1).run(layouts.load_and_train, kwargs)[0]["after"], written["after"])


def save_in_small_files(rank, world_size, **kwargs) -> dict:
    with mock.patch.object(writing, "_FILE_BYTES", 100_000):
        return layouts.train_and_save(rank, world_size, **kwargs)


@contextlib.contextmanager
def no_file_beyond(limit: int):
    """The system refuses to write more than `limit` bytes into a file, as it refuses any when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def attempt(checkpoints, trainer, step) -> str:
    """Save, and what is said when the last save is asked for."""
    checkpoints.save(step, trainer.model, trainer.optimizer, trainer.scheduler, {"step": step})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return ""


def save_on_a_full_disk(rank, world_size, *, run_dir, full, limit) -> dict:
    """Steps 1 to 3 are saved; at 2 the rank `full` can write no more than `limit` bytes. What is said, and what is there."""
    trainer = layouts.prepare(TP2, "adam", {}, ())
    root, said, there = checkpoint_root(run_dir), [], []
    with contextlib.closing(saving.Checkpoints(run_dir)) as checkpoints:
        for step in (1, 2, 3):
            layouts.run_step(trainer)
            with no_file_beyond(limit) if step == 2 and rank == full else contextlib.nullcontext():
                said.append(attempt(checkpoints, trainer, step))
            there.append(sorted(path.name for path in root.iterdir()))
            # The other rank must not write the next before this one has looked.
            Ranks().gather_all(None)
    return {"said": said, "there": there}


@pytest.mark.parametrize(("full", "limit"), [(1, 60_000), (0, 60_000), (0, 400_000)])
def test_a_full_disk_on_one_rank_is_said_on_all_and_the_next_save_is_whole(full, limit, worker_pool, tmp_path):
    ranks = worker_pool(2).run(save_on_a_full_disk, {"run_dir": str(tmp_path), "full": full, "limit": limit})
    for rank in ranks:
        first, second, third = rank["said"]
        assert first == third == ""
        assert f"step_00000002 could not be saved: rank {full}: File too large: raise the limit of a file's size" in second
        assert rank["there"][:2] == [["latest", "step_00000001"]] * 2
    assert seal.verify(latest_checkpoint(tmp_path), Ranks()) == [] and latest_checkpoint(tmp_path).name == "step_00000003"


def save_where_nothing_can_be(rank, world_size, *, run_dir) -> list[str]:
    """A file in the place of the folder: when the run starts, and when it saves."""
    root, said = checkpoint_root(run_dir), []
    if rank == 0:
        root.write_text("")
    Ranks().gather_all(None)
    trainer = layouts.prepare(TP2, "sgd", {}, ())
    try:
        saving.Checkpoints(run_dir)
    except CheckpointError as error:
        said.append(str(error))
    ranks = Ranks()
    if ranks.from_first(root.unlink) is None:
        with contextlib.closing(saving.Checkpoints(run_dir)) as checkpoints:
            ranks.from_first(lambda: (root.rmdir(), root.write_text("")))
            said.append(attempt(checkpoints, trainer, 1))
            ranks.from_first(root.unlink)
            said.append(attempt(checkpoints, trainer, 2))
    return said


def test_a_place_that_cannot_be_written_is_said_on_every_rank_when_the_run_starts(worker_pool, tmp_path):
    for at_start, at_save, afterwards in worker_pool(2).run(save_where_nothing_can_be, {"run_dir": str(tmp_path)}):
        assert at_start.startswith(f"{tmp_path}/checkpoints: no checkpoint can be written here: File exists")
        assert "step_00000001 could not be saved" in at_save and afterwards == ""


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "remount it"),
        (errno.EACCES, "right to write"),
        (errno.ENOENT, "that all nodes share"),
    ],
)
def test_an_error_of_the_system_comes_with_a_remedy(number, remedy):
    said = saving._explain(OSError(number, os.strerror(number), "/runs/a/checkpoints"))
    assert os.strerror(number) in said and "/runs/a/checkpoints" in said and remedy in said


class Crash(BaseException):
    """The process is gone: nothing after it runs, no handler of errors does."""


@contextlib.contextmanager
def crash_at(event: int):
    """Crash before the given one of all that a save does to the disk."""
    done: list[str] = []
    targets = {
        (os, "fsync"): os.fsync,
        (os, "replace"): os.replace,
        (Path, "rename"): Path.rename,
        (Path, "mkdir"): Path.mkdir,
        (shutil, "rmtree"): shutil.rmtree,
        (seal.SealedFile, "write"): seal.SealedFile.write,
        (seal.SealedFile, "__init__"): seal.SealedFile.__init__,
    }

    def counted(name, call):
        def run(*arguments, **keywords):
            # torch's writer turns whatever is raised in it into an error of its own.
            if name != "write" or isinstance(arguments[1], bytes):
                if len(done) == event:
                    raise Crash(name)
                done.append(name)
            return call(*arguments, **keywords)

        return run

    with contextlib.ExitStack() as patches:
        for (owner, name), call in targets.items():
            patches.enter_context(mock.patch.object(owner, name, counted(name, call)))
        yield


def crash_everywhere(rank, world_size, *, run_dir) -> list[tuple[str, str]]:
    """Crash a save of step 2 at every one of its events in turn; the event, and the checkpoint that a run would go on from."""
    from step_megatron.checkpoint.recovery import newest_good

    trainer = layouts.prepare({}, "adam", {}, ())
    root, outcomes = checkpoint_root(run_dir), []
    with contextlib.closing(saving.Checkpoints(run_dir, Retention(newest=1), asynchronous=False)) as checkpoints:
        for event in range(10_000):
            assert attempt(checkpoints, trainer, 1) == ""
            shutil.rmtree(checkpoint_at(root, 2), ignore_errors=True)
            crashed = ""
            try:
                with crash_at(event):
                    attempt(checkpoints, trainer, 2)
            except Crash as crash:
                crashed = str(crash)
                checkpoints._writing = None
            good = newest_good(run_dir)
            assert latest_checkpoint(run_dir) == good and not list(root.glob("damaged_*")) and not list(root.glob(".step_*"))
            outcomes.append((crashed, good.name))
            directory.point_to(good)
            if not crashed:
                return outcomes
    raise AssertionError("the save never came to its end")


def test_a_crash_anywhere_in_a_save_leaves_a_whole_checkpoint(worker_pool, tmp_path):
    outcomes = worker_pool(1).run(crash_everywhere, {"run_dir": str(tmp_path)})[0]
    events = [event for event, _ in outcomes]
    assert {"fsync", "replace", "rename", "mkdir", "rmtree", "write", "__init__"} <= set(events) and events[-1] == ""
    found = [name for _, name in outcomes]
    turn = found.index("step_00000002")
    # From the moment on when `latest` names the new one, it is the new one.
    assert set(found[:turn]) == {"step_00000001"} and set(found[turn:]) == {"step_00000002"}
    assert "replace" in events[:turn] and "rmtree" in events[turn:]
