"""Data parallelism, optimizer and gradient synchronisation, from Megatron's own parts.

Every field of `megatron.optimizer` and `megatron.ddp` is passed through to Megatron's dataclasses under its own name.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.transformer import TransformerConfig

from step_megatron.config.load import ConfigError
from step_megatron.config.passthrough import build_section
from step_megatron.config.schema import MegatronConfig
from step_megatron.runtime.megatron_optimizer import optimizer_parts

# Settings that both of Megatron's dataclasses declare and that must agree: either section may set them.
SHARED_FIELDS = ("use_distributed_optimizer", "overlap_param_gather")


def build_optimizer_config(megatron: MegatronConfig, transformer: TransformerConfig) -> OptimizerConfig:
    """Megatron's optimizer configuration; precision follows the transformer's.

    Raises:
        ConfigError: unknown field, missing learning rate, or a value that contradicts `megatron.ddp` or the model's precision.
    """
    values = {"min_lr": 0.0, **megatron.optimizer}
    if values.get("lr") is None:
        raise ConfigError("megatron.optimizer.lr is not set; give the peak learning rate, for example 1e-4")
    if values["min_lr"] > values["lr"]:
        raise ConfigError(f"megatron.optimizer.min_lr={values['min_lr']} exceeds megatron.optimizer.lr={values['lr']}")
    if values.get("optimizer", "adam") != "adam" and _shared(megatron)["use_distributed_optimizer"]:
        raise ConfigError(f"megatron.optimizer.optimizer={values['optimizer']}: Megatron's distributed optimizer does Adam only")
    derived = {"bf16": transformer.bf16, "fp16": transformer.fp16, "params_dtype": transformer.params_dtype}
    return build_section(OptimizerConfig, values, "megatron.optimizer", **derived, **_shared(megatron))


def build_ddp_config(megatron: MegatronConfig) -> DistributedDataParallelConfig:
    """Megatron's data-parallel configuration; gradients are accumulated and reduced in fp32 unless the run says otherwise.

    Raises:
        ConfigError: unknown field, or a value that contradicts `megatron.optimizer`.
    """
    values = {"grad_reduce_in_fp32": True, **megatron.ddp}
    return build_section(DistributedDataParallelConfig, values, "megatron.ddp", **_shared(megatron))


def _shared(megatron: MegatronConfig) -> dict[str, bool]:
    return {name: megatron.optimizer.get(name, megatron.ddp.get(name, False)) for name in SHARED_FIELDS}


class _DataParallel(DistributedDataParallel):
    """Megatron's wrapper, which nothing but its owner keeps.

    Megatron gives every gradient accumulator of autograd a hook that holds the wrapper, which holds the accumulator: a cycle
    through C++ that Python's collector does not see, so that model, gradients and process groups (50 threads and 74 files of a
    rank in a layout of two) stayed to the end of the process.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable:
        return DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)


def wrap_data_parallel(
    chunks: list[torch.nn.Module], transformer: TransformerConfig, ddp: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Wrap the model chunks of this rank (one, or one per virtual pipeline stage) and give all replicas the same parameters.

    Only the first chunk is bucketed unless gradients are reduced while the backward pass runs: buckets exist for that overlap.
    """
    wrapped = [
        _DataParallel(transformer, ddp, chunk, disable_bucketing=index > 0 and not ddp.overlap_grad_reduce)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped


def build_optimizer(config: OptimizerConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer over the trainable parameters; biases and norms are in groups without weight decay.

    The groups only carry the multiplier; `schedule.build_scheduler` makes the object that applies it.

    Raises:
        ConfigError: the distributed optimizer where a rank trains nothing, which it could not save; raised on every rank.
    """
    optimizer = get_megatron_optimizer(config, model, config_overrides=get_standard_config_overrides(config))
    parts = optimizer_parts(optimizer)
    if config.use_distributed_optimizer:
        idle = any(not any(group["params"] for group in part.optimizer.param_groups) for part in parts)
        if _on_any_rank(idle, next(model[0].parameters()).device):
            raise ConfigError(
                "megatron.optimizer.use_distributed_optimizer: model.freeze leaves a pipeline stage nothing to train, and such a "
                "run could not be saved; set it to false"
            )
    for part in parts:
        if isinstance(part.optimizer, torch.optim.AdamW):
            # Without Transformer Engine and apex Megatron takes torch's AdamW in its slowest form.
            for group in part.optimizer.param_groups:
                group["fused"] = True
    return optimizer


def gradient_norm(optimizer: MegatronOptimizer) -> float | None:
    """First half of Megatron's `step`: finish the gradients, and wait for their norm over all ranks, before clipping.

    Returns:
        None where scaled gradients overflowed: there is nothing to update with, and the loss scale has been made smaller.
    """
    return None if optimizer.prepare_grads() else optimizer.get_grad_norm()


def apply_update(optimizer: MegatronOptimizer, norm: float) -> None:
    """Second half of Megatron's `step`: clip by the norm of the first, and update. Left out, everything keeps its bits."""
    for part in optimizer_parts(optimizer):
        parameters = part.get_parameters()
        if part.config.clip_grad > 0 and parameters:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm, decoupled)
    optimizer.step_with_ready_grads()


def loss_scale_is_smallest(optimizer: MegatronOptimizer) -> bool:
    """Whether an overflow cannot be answered with a smaller loss scale; waits for the device."""
    scaler = getattr(optimizer, "chained_optimizers", [optimizer])[0].grad_scaler
    return not isinstance(scaler, DynamicGradScaler) or bool(scaler.scale <= scaler.min_scale)


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    answer = torch.tensor([flag], dtype=torch.int32, device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


def connect_gradients(transformer: TransformerConfig, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tell Megatron's schedules how to scale the loss, when not to reduce gradients, and how to finish them.

    `finalize_model_grads` reduces over replicas, adds what sequence parallelism left apart, and divides by the number of trained
    tokens of the step (`calculate_per_token_loss`).
    """
    many = len(model) > 1
    transformer.grad_scale_func = optimizer.scale_loss
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.no_sync_func = [chunk.no_sync for chunk in model] if many else model[0].no_sync
    ddp = model[0].ddp_config
    if ddp.overlap_grad_reduce:
        transformer.grad_sync_func = [chunk.start_grad_sync for chunk in model] if many else model[0].start_grad_sync
    if ddp.overlap_param_gather and ddp.align_param_gather:
        transformer.param_sync_func = [chunk.start_param_sync for chunk in model] if many else model[0].start_param_sync


@contextmanager
def settled_parameters(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Inside, all ranks hold the parameters after the last update: with overlap they are gathered in the next forward pass."""
    overlapped = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in overlapped:
        chunk.enable_forward_pre_hook()
