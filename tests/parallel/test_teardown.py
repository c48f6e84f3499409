"""A process may train in one layout after another: `shutdown` ends all threads, sockets and memory of the one before."""

import gc
import os

from parallel.layouts import train

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20000}


def resources(rank: int, world_size: int) -> tuple[int, int, int]:
    """Threads, open files and model wrappers of this process."""
    from megatron.core.distributed import DistributedDataParallel

    wrappers = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), wrappers


def test_shutdown_frees_what_a_layout_took(worker_pool):
    pool = worker_pool(2)
    before = []
    for _ in range(2):
        pool.run(train, {"transformer": {}, "optimizer": "adam", "ddp": OVERLAPPED})
        before.append(pool.run(resources))
    # What the first run starts for good (torch's pools, the store's connection) is there in the second as well.
    assert before[1] == before[0]
    assert {wrappers for _, _, wrappers in before[1]} == {0}
