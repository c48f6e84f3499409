"""Runs that are killed, hang, or are told to stop: they go on to the same end as a run that was left in peace."""

import time

import pytest
from support.rank_processes import RankProcesses
from training.survival import LAYOUTS, Kill, campaign, remains, run_rank, run_to_end


@pytest.fixture
def ranks(tmp_path):
    with RankProcesses(2, tmp_path) as processes:
        yield processes


def test_five_kills_change_nothing(ranks, worker_pool, data, tmp_path):
    kwargs = {"data": data, "extra": LAYOUTS["dp2-distributed-optimizer"]}
    worker_pool(2).run(run_rank, kwargs | {"run_dir": str(tmp_path / "whole")})
    kills = [
        Kill((0, 1), "in the quarantine"),
        Kill((1,), "before an update"),
        Kill((0,), "in a file of a checkpoint"),
        Kill((0, 1), "before latest names a checkpoint"),
        Kill((1,), "in the plan of the loader"),
    ]
    assert run_to_end(ranks, kwargs | {"run_dir": str(tmp_path / "killed")}, kills) == 5
    assert remains(tmp_path / "killed") == remains(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_five_kills_change_nothing():
    assert campaign(25, seed=1)["kills"] == 25


def test_a_rank_that_hangs_is_named_with_its_function_and_all_leave(ranks, data, tmp_path):
    extra = (*LAYOUTS["dp2-distributed-optimizer"], "training.hang_timeout_seconds=5", "training.steps=8")
    kwargs = {"data": data, "run_dir": str(tmp_path / "run"), "extra": extra}
    ranks.start(run_rank, kwargs | {"hold": {1: "in the plan of the loader"}})
    assert ranks.join() == [75, 75], ranks.logs()
    report = (tmp_path / "run" / "hangs" / "report.txt").read_text()
    assert "the run hangs: no sign of rank 1 for 5 s" in report and report in ranks.logs()
    assert "rank 1 HANGS: step " in report and ", load, in stay (" in report and "rank 0 waits: step " in report
    assert "in stay" in (tmp_path / "run" / "hangs" / "rank_1.txt").read_text()
    assert "torch/distributed" in (tmp_path / "run" / "hangs" / "rank_0.txt").read_text()
    # What is left can be gone on with.
    assert run_to_end(ranks, kwargs, []) == 0


def test_a_rank_whose_interpreter_is_kept_by_c_code_is_named_by_the_others(ranks, data, tmp_path):
    kwargs = {"data": data, "run_dir": str(tmp_path / "run"), "extra": ("training.hang_timeout_seconds=5",)}
    ranks.start(run_rank, kwargs | {"hold": {1: "before an update"}, "how": "keep_interpreter"})
    # The one that is kept cannot leave by itself: it is killed, as torchrun would, when its stack is written.
    stack = tmp_path / "run" / "hangs" / "rank_1.txt"
    until = time.monotonic() + 120
    while time.monotonic() < until and not (stack.is_file() and "in keep_interpreter" in stack.read_text()):
        time.sleep(0.1)
    assert ranks.join_one(0) == 75, ranks.logs()
    ranks.kill([1])
    assert ranks.join() == [75, -9], ranks.logs()
    report = (tmp_path / "run" / "hangs" / "report.txt").read_text()
    assert "rank 1 HANGS" in report and "silent: dead, stopped, or inside C code" in report
    assert "in keep_interpreter" in stack.read_text()
