"""The worker pool itself: results by rank, failures with tracebacks, hangs with stacks, recovery."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from support.worker_pool import WorkerError

from step_megatron.config.schema import Config, MegatronConfig
from step_megatron.runtime.device import initialize


def add_up(rank, world_size, *, tp):
    runtime = initialize(Config(megatron=MegatronConfig(transformer={"tensor_model_parallel_size": tp})))
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    return total, runtime.tp_rank, runtime.dp_rank, os.getpid(), torch.get_num_threads()


def fail_on_one_rank(rank, world_size):
    initialize(Config())
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def wait_for_a_message_that_never_comes(rank, world_size):
    if rank == 0:
        time.sleep(600)


def die(rank, world_size):
    os._exit(7)


def test_results_come_in_rank_order_and_layouts_change_in_the_same_processes(worker_pool):
    first = worker_pool(2).run(add_up, {"tp": 2})
    second = worker_pool(2).run("test_worker_pool:add_up", {"tp": 1})
    assert [answer[0].item() for answer in first + second] == [3.0] * 4
    assert [answer[1:3] for answer in first] == [(0, 0), (1, 0)]
    assert [answer[1:3] for answer in second] == [(0, 0), (0, 1)]
    assert [answer[3] for answer in first] == [answer[3] for answer in second]
    assert all(answer[4] == 1 for answer in first)


def test_an_exception_on_one_rank_shows_its_traceback_and_where_the_others_wait(worker_pool):
    with pytest.raises(WorkerError) as failure:
        worker_pool(2).run(fail_on_one_rank)
    assert "rank one is unwell" in str(failure.value)
    assert "barrier" in str(failure.value)
    assert worker_pool(2).run(add_up, {"tp": 2})[0][0].item() == 3.0


def test_a_hang_shows_the_stack_of_the_rank_that_hangs(worker_pool):
    with pytest.raises(WorkerError) as failure:
        worker_pool(2).run(wait_for_a_message_that_never_comes, timeout=1.0)
    assert "rank 0: at work" in str(failure.value)
    assert "wait_for_a_message_that_never_comes" in str(failure.value)
    assert "rank 1: ok" in str(failure.value)


def test_a_process_that_dies_is_reported_with_its_exit_code(worker_pool):
    with pytest.raises(WorkerError, match="exit code 7"):
        worker_pool(2).run(die)
