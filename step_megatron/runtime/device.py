"""Starts and ends a run's processes: device, process groups, Megatron's parallel state, threads, seeds.

`initialize(config)` works under torchrun, and without it as a single process. After `shutdown()` another layout can be
initialised in the same process (the test pools do).
"""

import datetime
import gc
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist

from step_megatron.config.schema import Config
from step_megatron.runtime import machine, megatron_cpu, megatron_release, seeds

# The order in which Megatron lays the dimensions out over ranks; also used to find the ranks of one replica.
_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True)
class Runtime:
    """Where this process stands.

    `control_group` is a gloo group of the ranks of one data-parallel replica (tensor x context x pipeline): they exchange small
    host values over it (which clips failed, whether to stop) without touching the device. `timeout` is `run.timeout_minutes`:
    every process group that is made beside these takes it too, or it would wait for torch's own default.
    """

    device: torch.device
    backend: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    threads: int
    control_group: dist.ProcessGroup
    timeout: datetime.timedelta
    is_first_stage: bool
    is_last_stage: bool
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int


@dataclass(frozen=True)
class _Layout:
    tp: int
    pp: int
    cp: int
    vpp: int | None


# Between two looks into the store while ranks wait for each other.
_POLL_SECONDS = 0.02

# The store outlives the groups: a process that initialises twice meets its peers on the same store under another prefix.
_store: dist.Store | None = None
_generation = 0
_runtime: Runtime | None = None


def initialize(config: Config) -> Runtime:
    """Start the runtime of this process; collective over all ranks.

    Args:
        config: `run` chooses device, backend, threads and seed; the parallel sizes are those of `megatron.transformer`.

    Raises:
        ValueError: no such device, a world size that the layout does not divide, a backend that the device cannot use, or ops
            that other kernels compute than on the first rank.
        ImportError: Megatron-Core is missing or another release than the tested one.
        RuntimeError: the runtime is already initialised.
    """
    global _runtime
    if _runtime is not None:
        raise RuntimeError("the runtime is already initialised in this process; call shutdown() first")
    megatron_release.check_version()
    megatron_release.silence_import_warnings()
    rank, world_size, local_rank, local_world_size = _environment()
    layout = _layout(config, world_size)
    device = _device(config.run.device, local_rank)
    backend = _backend(config.run.backend, device)
    megatron_cpu.install()
    threads = _threads(config.run.threads, machine.cores(), local_world_size)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        timeout = datetime.timedelta(minutes=config.run.timeout_minutes)
        _join(backend, rank, world_size, timeout)
        control_group = _build_groups(layout, world_size, timeout)
        _agree_on_kernels(rank, device)
        place = (rank, world_size, local_rank, local_world_size)
        _runtime = _describe(device, backend, place, threads, control_group, timeout)
        seeds.seed_everything(config.run.seed, _runtime.pp_rank)
    except BaseException:
        _runtime = None
        _destroy()
        raise
    return _runtime


def current() -> Runtime | None:
    """The runtime of this process, None before `initialize` and after `shutdown`."""
    return _runtime


def store_client(name: str) -> dist.Store:
    """A client of its own of the store that all ranks share, its keys under `name`: a thread that waits in a client holds it."""
    return dist.PrefixStore(f"step-megatron/{_generation}/{name}", _store.clone())


def shutdown() -> None:
    """End the runtime: groups, Megatron's globals and the CPU adapter. Does nothing when there is none.

    Waits for the other ranks, so that none loses a message still on its way; not when called while an exception is on its way up,
    since the others may never come.
    """
    global _runtime
    if _runtime is None:
        return
    if sys.exc_info()[0] is None:
        dist.barrier()
    _runtime = None
    _destroy()


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    megatron_release.reset_globals()
    megatron_cpu.uninstall()
    # A group ends, with its threads and sockets, when nothing holds it any more; models do, and are in cycles.
    gc.collect()


def _environment() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, local world size), from torchrun's variables, or those of a single process."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 0, 1, 0, 1
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return rank, world_size, int(os.environ.get("LOCAL_RANK", rank % local_world_size)), local_world_size


def _layout(config: Config, world_size: int) -> _Layout:
    settings = config.megatron.transformer
    sizes = {}
    for short, name in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
        field = "context_parallel_size" if short == "cp" else f"{name}_model_parallel_size"
        value = settings.get(field, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"megatron.transformer.{field} is {value!r}; it has to be a whole number, 1 or more")
        sizes[short] = value
    ranks = sizes["tp"] * sizes["pp"] * sizes["cp"]
    if world_size % ranks:
        nearest = ranks * max(1, round(world_size / ranks))
        raise ValueError(
            f"{world_size} processes cannot be divided into replicas of {ranks} "
            f"(tensor {sizes['tp']} x pipeline {sizes['pp']} x context {sizes['cp']}); the nearest number that works is "
            f"{nearest}: start with torchrun --nproc-per-node {nearest}, or change megatron.transformer.*_parallel_size"
        )
    vpp = settings.get("virtual_pipeline_model_parallel_size")
    if vpp is not None and sizes["pp"] == 1:
        raise ValueError(
            f"megatron.transformer.virtual_pipeline_model_parallel_size is {vpp}, but pipeline_model_parallel_size is 1; "
            "virtual stages need a pipeline of 2 or more"
        )
    return _Layout(**sizes, vpp=vpp)


def _device(wanted: str, local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("run.device is cuda, but torch sees no CUDA device; use run.device=cpu, or see `step-megatron doctor`")
    if wanted == "cpu" and available:
        # Megatron places tensors on the CUDA device whenever there is one.
        raise ValueError("run.device is cpu, but CUDA is visible and Megatron-Core would use it; set CUDA_VISIBLE_DEVICES=''")
    if not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; "
            "start at most that many processes on a node"
        )
    return torch.device("cuda", local_rank)


def _backend(wanted: str, device: torch.device) -> str:
    if wanted == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if wanted == "nccl" and device.type == "cpu":
        raise ValueError("run.backend is nccl, which moves GPU memory only, but the device is the CPU; use run.backend=gloo")
    return wanted


def _threads(wanted: int, cores: int, local_world_size: int) -> int:
    return wanted or max(1, cores // local_world_size)


def _join(backend: str, rank: int, world_size: int, timeout: datetime.timedelta) -> None:
    """Meet the other ranks. Every initialisation has a prefix of its own, so that it never reads keys of the one before."""
    global _store, _generation
    if _store is None:
        # A single process needs no port at all.
        _store = dist.HashStore() if world_size == 1 else _fresh_store(rank, world_size, timeout)
    _generation += 1
    store = dist.PrefixStore(f"step-megatron/{_generation}", _store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _fresh_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's store, under a prefix that these processes alone have.

    torchrun keeps its store when it restarts the ranks, and they must not read what their predecessors left: the first rank names
    the prefix to the others, each of which says hello under a name of its own until it is answered.
    """
    store = next(dist.rendezvous("env://", timeout=timeout))[0]
    deadline = time.monotonic() + timeout.total_seconds()
    mine = uuid.uuid4().hex
    if rank == 0:
        waiting = set(range(1, world_size))
        while waiting and time.monotonic() < deadline:
            for other in sorted(waiting):
                if store.check([f"hello/{other}"]):
                    # A predecessor's name is answered as well; only one of these processes says that it has come.
                    store.set(f"prefix/{store.get(f'hello/{other}').decode()}", mine)
                if store.check([f"come/{mine}/{other}"]):
                    waiting.remove(other)
            time.sleep(_POLL_SECONDS)
        if waiting:
            raise TimeoutError(f"ranks {sorted(waiting)} did not come within run.timeout_minutes")
        return dist.PrefixStore(mine, store)
    while not store.check([f"prefix/{mine}"]):
        if time.monotonic() > deadline:
            raise TimeoutError("the first rank did not come within run.timeout_minutes")
        store.set(f"hello/{rank}", mine)
        time.sleep(_POLL_SECONDS)
    prefix = store.get(f"prefix/{mine}").decode()
    store.set(f"come/{prefix}/{rank}", "")
    return dist.PrefixStore(prefix, store)


def _agree_on_kernels(rank: int, device: torch.device) -> None:
    """Refuse ranks whose ops are computed by other kernels: what all of them compute has to have the same bits.

    The first rank's answer lies in the store, so this needs no device and no collective.

    Raises:
        ValueError: on every rank that differs from the first; names the first difference.
    """
    from step_kernels import choices, registry

    mine, store = registry.computed_by(device), dist.PrefixStore(f"step-megatron/{_generation}/kernels", _store)
    if rank == 0:
        store.set("computed_by", json.dumps(mine))
        return
    first = json.loads(store.get("computed_by"))
    for op in sorted(mine | first):
        # A width without an entry of its own is computed as any other; an op without one cannot run, and says so when it has to.
        here, there = (told.get(op, told.get(op.rsplit(" ", 1)[0])) for told in (mine, first))
        if here and there and here != there:
            raise ValueError(
                f"rank {rank} computes {op} by {here}, rank 0 by {there}: give every node the same installation, the same "
                f"{registry.VARIABLE} and the same file of choices ({choices.path()}; {choices.VARIABLE} empty: none)"
            )


def _build_groups(layout: _Layout, world_size: int, timeout: datetime.timedelta) -> dist.ProcessGroup:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        order=_ORDER,
        distributed_timeout_minutes=round(timeout.total_seconds() / 60),
    )
    replicas = parallel_state.RankGenerator(
        tp=layout.tp, ep=1, dp=world_size // (layout.tp * layout.pp * layout.cp), pp=layout.pp, cp=layout.cp, order=_ORDER
    ).get_ranks("tp-cp-pp")
    # Every rank has to take part in the making of every group.
    groups = [dist.new_group(ranks, backend="gloo", timeout=timeout) for ranks in replicas]
    return next(group for ranks, group in zip(replicas, groups, strict=True) if dist.get_rank() in ranks)


def _describe(
    device: torch.device,
    backend: str,
    place: tuple[int, int, int, int],
    threads: int,
    control_group: dist.ProcessGroup,
    timeout: datetime.timedelta,
) -> Runtime:
    from megatron.core import parallel_state

    rank, world_size, local_rank, local_world_size = place
    return Runtime(
        device=device,
        backend=backend,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        threads=threads,
        control_group=control_group,
        timeout=timeout,
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_group().size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_group().size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_group().size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_group().size(),
    )
