"""The CPU adapter: every adjustment has a part of Megatron that works with it and does not without it."""

import logging

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from step_megatron.runtime import megatron_cpu


def rotary_table():
    """`device=torch.cuda.current_device()`."""
    assert RotaryEmbedding(kv_channels=8, rotary_percent=1.0)(4).device.type == "cpu"


def timers():
    """`torch.cuda.synchronize()`."""
    from megatron.core.timers import Timers

    timer = Timers(log_level=0, log_option="max")("step", log_level=0)
    timer.start()
    timer.stop()
    assert timer.elapsed() >= 0


def positions_of_a_context_parallel_rank():
    """`torch.tensor(..., pin_memory=True).cuda(non_blocking=True)`."""
    from megatron.core import parallel_state

    table = torch.arange(8.0).view(4, 1, 1, 2)
    torch.testing.assert_close(get_pos_emb_on_this_cp_rank(table, 0, parallel_state.get_context_parallel_group()), table)


def loss_scale():
    """`torch.tensor(..., device="cuda")`."""
    from megatron.core.optimizer.grad_scaler import ConstantGradScaler

    assert ConstantGradScaler(2.0).scale.item() == 2.0


def gradient_clipping():
    """`gradient.type() == "torch.cuda.FloatTensor"`."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((3,), 10.0)
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=10.0)
    torch.testing.assert_close(parameter.grad, torch.ones(3))


def zeros_of_a_gradient():
    """`torch.zeros(..., device="cuda")`."""
    import torch.distributed as dist
    from megatron.core.optimizer.clip_grads import count_zeros_fp32

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([0.0, 1.0, 0.0])
    assert count_zeros_fp32([parameter], dist.group.WORLD) == 2


def causal_mask():
    """`torch.ones(..., device="cuda")`."""
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(3).sum() == 3


def sharded(data):
    from megatron.core.dist_checkpointing import ShardedTensor

    return ShardedTensor.from_rank_offsets("weight", data)


def checkpoint_tensor():
    """`ShardedTensor.init_data("cuda")`."""
    tensor = sharded(torch.zeros(2)).without_data()
    tensor.init_data("cuda")
    assert tensor.data.device.type == "cpu"


def checkpoint_exchange():
    """`torch.empty_like(..., device="cuda")`."""
    from megatron.core.dist_checkpointing.exchange_utils import _get_empty_tensor_for_exchange

    tensor, _ = _get_empty_tensor_for_exchange("id", {}, {"id": sharded(torch.zeros(2))}, {})
    assert tensor.shape == (2,) and tensor.device.type == "cpu"


def random_numbers_of_a_tensor_parallel_region():
    """`torch.cuda.manual_seed`, `get_rng_state` (under two names) and Megatron's own setter."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def expected(seed):
        return torch.rand(3, generator=torch.Generator().manual_seed(seed))

    model_parallel_cuda_manual_seed(11)
    with get_cuda_rng_tracker().fork():
        torch.testing.assert_close(torch.rand(3), expected(11 + 2718), rtol=0, atol=0)
    torch.testing.assert_close(torch.rand(3), expected(11), rtol=0, atol=0)


class Compiled(Exception):
    pass


def refuse_to_compile(graph, inputs):
    raise Compiled


@torch.compile(backend=refuse_to_compile)
def compiled_helper(x):
    return x + 1


def helpers_run_uncompiled():
    """`jit_fuser` is `torch.compile`."""
    torch._dynamo.reset()
    assert compiled_helper(torch.ones(1)).item() == 2


SITES = {
    ("torch.cuda", "current_device"): rotary_table,
    ("torch.cuda", "synchronize"): timers,
    ("Tensor", "cuda"): positions_of_a_context_parallel_rank,
    ("Tensor", "type"): gradient_clipping,
    ("torch.cuda", "manual_seed"): random_numbers_of_a_tensor_parallel_region,
    ("torch.cuda", "get_rng_state"): random_numbers_of_a_tensor_parallel_region,
    ("torch.cuda.random", "get_rng_state"): random_numbers_of_a_tensor_parallel_region,
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state"): random_numbers_of_a_tensor_parallel_region,
    ("torch._dynamo.config", "disable"): helpers_run_uncompiled,
    ("torch", "tensor"): loss_scale,
    ("torch", "zeros"): zeros_of_a_gradient,
    ("torch", "ones"): causal_mask,
    ("ShardedTensor", "init_data"): checkpoint_tensor,
    ("torch", "empty_like"): checkpoint_exchange,
}


def named(key):
    return key[0].__name__, key[1]


def test_every_adjustment_has_a_site(runtime):
    assert {named(key) for key in megatron_cpu.originals} == set(SITES)


@pytest.mark.parametrize("name", SITES, ids=lambda name: ".".join(name))
def test_adjustment_is_what_makes_this_part_of_megatron_work(name, runtime, monkeypatch):
    SITES[name]()
    owner, attribute = key = next(key for key in megatron_cpu.originals if named(key) == name)
    monkeypatch.setattr(owner, attribute, megatron_cpu.originals[key])
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError, Compiled)):
        SITES[name]()


def test_pinned_memory_needs_the_adapter(runtime, monkeypatch):
    positions_of_a_context_parallel_rank()
    monkeypatch.setattr(torch, "tensor", megatron_cpu.originals[torch, "tensor"])
    with pytest.raises(RuntimeError):
        positions_of_a_context_parallel_rank()


def test_shared_generator_does_not_warn_at_every_fork(runtime, caplog):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def warnings():
        caplog.clear()
        with get_cuda_rng_tracker().fork():
            torch.rand(1)
        return [record for record in caplog.records if "CPU RNG state changed" in record.getMessage()]

    with caplog.at_level(logging.WARNING):
        assert not warnings()
        logging.getLogger(megatron_cpu._RANDOM_LOGGER).removeFilter(megatron_cpu._host_generator_is_the_device_generator)
        assert warnings()


def test_other_uses_of_what_is_replaced_are_as_before(runtime):
    assert torch.ones(2).type() == "torch.FloatTensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2, dtype=torch.int32).tolist() == [0, 0]


def test_uninstalling_puts_everything_back():
    before = {name: getattr(torch, name) for name in ("tensor", "zeros", "ones", "empty_like")}
    before_cuda = torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type
    assert megatron_cpu.install() and megatron_cpu.install()
    assert torch.zeros is not before["zeros"]
    megatron_cpu.uninstall()
    megatron_cpu.uninstall()
    assert {name: getattr(torch, name) for name in before} == before
    assert (torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type) == before_cuda


def test_nothing_is_replaced_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros = torch.zeros
    assert not megatron_cpu.install()
    assert torch.zeros is zeros and not megatron_cpu.originals


def test_device_contexts_rule_torchs_own_factories_after_the_adapter_was_there():
    """torch keeps the list of factories that it makes in the first device context, also when that is inside of the adapter."""
    from torch.utils import _device

    megatron_cpu.uninstall()
    _device._device_constructors.cache_clear()
    megatron_cpu.install()
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta and torch.zeros(2).is_meta
    megatron_cpu.uninstall()
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta and torch.zeros(2).is_meta
