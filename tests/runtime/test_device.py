"""Starting and ending the runtime: layouts, re-initialisation, backends, threads, seeds, and errors that say what to do."""

import io
import json
import os
import random
import subprocess
import sys
import time
from unittest import mock

import numpy
import pytest
import torch
import torch.distributed as dist
from support.worker_pool import WorkerError

from step_megatron.config.schema import Config, MegatronConfig, RunConfig
from step_megatron.runtime import device, megatron_release, seeds
from step_megatron.runtime.device import current, initialize, shutdown


def configured(run=None, **transformer):
    return Config(run=RunConfig(**({"threads": 1} | (run or {}))), megatron=MegatronConfig(transformer=transformer))


def place(runtime):
    return {
        "tp": (runtime.tp_rank, runtime.tp_size),
        "pp": (runtime.pp_rank, runtime.pp_size),
        "cp": (runtime.cp_rank, runtime.cp_size),
        "dp": (runtime.dp_rank, runtime.dp_size),
        "stages": (runtime.is_first_stage, runtime.is_last_stage),
    }


def timeouts_of_new_groups(rank, world_size):
    """Seconds that the groups may wait which are made after the runtime's own."""
    from step_megatron.audio.encode_once import _host_groups

    runtime = initialize(configured({"timeout_minutes": 7}))
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as made:
        _host_groups(runtime)
    return [call.kwargs["timeout"].total_seconds() for call in made.call_args_list]


def test_every_group_waits_as_long_as_the_run_says(worker_pool):
    assert worker_pool(2).run(timeouts_of_new_groups) == [[420.0], [420.0]]


def one_layout(rank, world_size, *, sizes):
    runtime = initialize(configured(**sizes))
    members = [None] * dist.get_world_size(runtime.control_group)
    dist.all_gather_object(members, rank, group=runtime.control_group)
    return place(runtime) | {"control": members, "rank": runtime.rank, "local": (runtime.local_rank, runtime.local_world_size)}


@pytest.mark.parametrize(
    "sizes, control",
    [
        ({"tensor_model_parallel_size": 4}, [[0, 1, 2, 3]]),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, [[0, 1, 2, 3]]),
        ({"pipeline_model_parallel_size": 2}, [[0, 2], [1, 3]]),
        ({"context_parallel_size": 2}, [[0, 1], [2, 3]]),
        ({"tensor_model_parallel_size": 2}, [[0, 1], [2, 3]]),
        ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}, [[0, 1, 2, 3]]),
        ({}, [[0], [1], [2], [3]]),
    ],
)
def test_layouts_follow_one_another_in_the_same_processes(worker_pool, sizes, control):
    results = worker_pool(4).run(one_layout, {"sizes": sizes})
    sized = {"tp": sizes.get("tensor_model_parallel_size", 1), "pp": sizes.get("pipeline_model_parallel_size", 1)}
    sized["cp"] = sizes.get("context_parallel_size", 1)
    sized["dp"] = 4 // (sized["tp"] * sized["pp"] * sized["cp"])
    assert all(result[name][1] == size for result in results for name, size in sized.items())
    # Every place is taken once.
    assert len({tuple(result[name][0] for name in sized) for result in results}) == 4
    for rank, result in enumerate(results):
        assert result["rank"] == rank and result["local"] == (rank, 4)
        assert result["stages"] == (result["pp"][0] == 0, result["pp"][0] == sized["pp"] - 1)
        # One replica: the ranks with the same data-parallel rank.
        assert result["control"] == next(group for group in control if rank in group)
        assert all(results[other]["dp"][0] == result["dp"][0] for other in result["control"])


def draws(rank, world_size):
    initialize(configured(tensor_model_parallel_size=2, pipeline_model_parallel_size=2))
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        inside = torch.rand(1).item()
    return torch.rand(1).item(), inside


def test_tensor_parallel_ranks_share_the_default_generator_only(worker_pool):
    outside, inside = zip(*worker_pool(4).run(draws), strict=True)
    assert outside[0] == outside[1] and outside[2] == outside[3] and outside[0] != outside[2]
    assert len(set(inside)) == 4


def fail_while_the_other_rank_never_ends(rank, world_size):
    initialize(configured())
    if rank == 1:
        time.sleep(600)
    try:
        raise KeyError("on the way up")
    except KeyError:
        shutdown()


def test_shutdown_during_an_exception_does_not_wait_for_the_others(worker_pool):
    with pytest.raises(WorkerError, match="rank 0: ok"):
        worker_pool(2).run(fail_while_the_other_rank_never_ends, timeout=5.0)


def start_with_kernels(rank, world_size, *, environment, forced):
    """The error of starting where the ranks after the first have these settings of kernels."""
    from step_kernels import choices, registry

    choices.load.cache_clear()
    with mock.patch.dict(os.environ, environment if rank else {}), registry.forced(forced if rank else ""):
        try:
            initialize(configured())
        except ValueError as error:
            return str(error)
        finally:
            choices.load.cache_clear()
    try:
        raise KeyError("so that nobody waits for a rank that has not started")
    except KeyError:
        shutdown()
    return ""


def measured(path, **changes) -> dict[str, str]:
    """The setting that names a file with one choice."""
    from step_kernels import choices

    told = {"device": choices.device_name(torch.device("cpu")), "op": "audio_attention_varlen", "dtype": "float32", "width": 64}
    told |= {"over": "", "ratio": 0.0, "date": "", "torch": "", "versions": {}, "cases": [], "milliseconds": {}, "excluded": {}}
    path.write_text(json.dumps({"format": 1, "choices": [told | changes]}))
    return {"STEP_KERNELS_CHOICES": str(path)}


def test_a_rank_whose_ops_run_by_other_kernels_is_named(worker_pool, tmp_path):
    def start(environment, forced=""):
        return worker_pool(2).run(start_with_kernels, {"environment": environment, "forced": forced})

    path = tmp_path / "choices.json"
    # What does not change which kernel runs here is no difference: of another device, or what runs anyway.
    assert start(measured(path, device="NVIDIA H100 80GB HBM3", backend="flash", dtype="bfloat16")) == ["", ""]
    assert start(measured(path, backend="cpp"), "cpp,torch") == ["", ""]
    first, second = start(measured(path, backend="torch"))
    assert first == "" and second.startswith(
        f"rank 1 computes audio_attention_varlen float32 64 by torch {torch.__version__}, rank"
    )
    first, second = start({}, "torch")
    assert first == "" and "float32 by torch" in second and "rank 0 by cpp avx" in second


def test_single_process_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    try:
        runtime = initialize(configured())
        assert current() is runtime
        assert place(runtime) == {name: (0, 1) for name in ("tp", "pp", "cp", "dp")} | {"stages": (True, True)}
        assert (runtime.device, runtime.backend, runtime.world_size) == (torch.device("cpu"), "gloo", 1)
        assert dist.get_backend() == "gloo" and dist.get_backend(runtime.control_group) == "gloo"
    finally:
        shutdown()
    assert current() is None and not dist.is_initialized()
    shutdown()


def test_under_torchrun(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, torch.distributed as dist\n"
        "zeros = torch.zeros\n"
        "from step_megatron.config.schema import Config, MegatronConfig\n"
        "from step_megatron.runtime.device import initialize, shutdown\n"
        "assert torch.zeros is zeros, 'importing the runtime must not adapt torch'\n"
        "for size in (2, 1):\n"
        "    runtime = initialize(Config(megatron=MegatronConfig(transformer={'tensor_model_parallel_size': size})))\n"
        "    total = torch.tensor([runtime.rank + 1.0]); dist.all_reduce(total)\n"
        "    assert (total.item(), runtime.tp_size, runtime.dp_size) == (3.0, size, 2 // size)\n"
        "    shutdown()\n"
        "open(sys.argv[1] + f'/{runtime.rank}', 'w').close()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*command, str(program), str(tmp_path)], check=True, timeout=300)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_initialising_twice_is_refused(runtime):
    with pytest.raises(RuntimeError, match="already initialised"):
        initialize(configured())


@pytest.mark.parametrize(
    "world, sizes, message",
    [
        (6, {"tensor_model_parallel_size": 4}, r"6 processes .* replicas of 4 \(tensor 4 x pipeline 1 x context 1\).* is 8"),
        (5, {"tensor_model_parallel_size": 2}, r"the nearest number that works is 4: start with torchrun --nproc-per-node 4"),
        (1, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, r"is 4: start"),
        (1, {"tensor_model_parallel_size": 0}, r"tensor_model_parallel_size is 0; it has to be a whole number, 1 or more"),
        (1, {"context_parallel_size": "2"}, r"context_parallel_size is '2'"),
        (1, {"virtual_pipeline_model_parallel_size": 2}, r"virtual stages need a pipeline of 2 or more"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_numbers(monkeypatch, world, sizes, message):
    monkeypatch.setattr(device, "_environment", lambda: (0, world, 0, world))
    with pytest.raises(ValueError, match=message):
        initialize(configured(**sizes))
    assert current() is None


def test_a_failed_start_leaves_nothing_behind(monkeypatch):
    zeros = torch.zeros
    with pytest.raises(ValueError, match="run.seed is -1; it has to be from 0 to 2147483647"):
        initialize(configured({"seed": -1}))
    assert current() is None and not dist.is_initialized() and torch.zeros is zeros
    initialize(configured())
    shutdown()


def test_backends():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert device._backend("auto", cpu) == "gloo"
    assert device._backend("auto", gpu) == "nccl"
    assert device._backend("gloo", gpu) == "gloo"
    with pytest.raises(ValueError, match="use run.backend=gloo"):
        initialize(configured({"backend": "nccl"}))


def test_devices(monkeypatch):
    with pytest.raises(ValueError, match="run.device is cuda, but torch sees no CUDA device"):
        initialize(configured({"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device._device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=''"):
        device._device("cpu", 0)
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 are visible"):
        device._device("cuda", 2)


@pytest.mark.parametrize("threads, cores, ranks, expected", [(3, 8, 1, 3), (0, 8, 2, 4), (0, 2, 4, 1)])
def test_threads(monkeypatch, threads, cores, ranks, expected):
    assert device._threads(threads, cores, ranks) == expected


def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        assert initialize(configured({"threads": 2})).threads == torch.get_num_threads() == 2
    finally:
        shutdown()
        torch.set_num_threads(before)


def test_other_release_of_megatron_is_refused_with_the_command():
    megatron_release.check_version(megatron_release.TESTED_RELEASE)
    with pytest.raises(ImportError, match=r"pip install megatron-core==0\.16\.1"):
        megatron_release.check_version("0.15.0")


def test_transformer_defaults_yield_to_the_user():
    on_cpu = megatron_release.transformer_defaults({"hidden_size": 8, "batch_p2p_sync": True}, on_cpu=True)
    assert on_cpu["hidden_size"] == 8 and on_cpu["batch_p2p_sync"] is True
    assert on_cpu["masked_softmax_fusion"] is False and on_cpu["calculate_per_token_loss"] is True
    on_gpu = megatron_release.transformer_defaults({"virtual_pipeline_model_parallel_size": 2}, on_cpu=False)
    assert "masked_softmax_fusion" not in on_gpu
    assert on_gpu["overlap_p2p_comm"] is True and on_gpu["batch_p2p_comm"] is False


def test_sub_seeds_depend_on_every_name_and_are_stable():
    assert seeds.derive(1, "mixture", 0) == seeds.derive(1, "mixture", 0)
    values = {seeds.derive(*parts) for parts in [(1, "mixture", 0), (1, "mixture", 1), (2, "mixture", 0), (1, "packing", 0)]}
    assert len(values) == 4 and all(0 <= value < 2**63 for value in values)
    # Written down: another machine or Python version has to draw the same plan.
    assert seeds.derive(1234, "mixture") == 1908803242769227894
    assert torch.equal(torch.rand(2, generator=seeds.generator(3, "a")), torch.rand(2, generator=seeds.generator(3, "a")))


def test_the_seed_of_the_run_decides_every_generator():
    def everything():
        initialize(configured({"seed": 5}))
        try:
            return random.random(), numpy.random.random(), torch.rand(1).item()
        finally:
            shutdown()

    assert everything() == everything()


def test_random_state_goes_back_to_where_it_was(runtime):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw():
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(1).item()
        return random.random(), numpy.random.random(), torch.rand(1).item(), inside

    draw()
    buffer = io.BytesIO()
    torch.save(seeds.rng_state(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    first, second = draw(), draw()
    seeds.load_rng_state(state)
    assert draw() == first != second
    seeds.load_rng_state(state)
    assert draw() == first


def test_environment_of_torchrun(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert device._environment() == (5, 8, 1, 4)
