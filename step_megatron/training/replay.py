"""Runs the batch of a step that was out of order again, forward and backward: which samples, which parameters are at fault?

    step-megatron train replay RUN/anomalies/0001_step_00000012_rank_0

runs one replica's part of the step on the weights of the newest checkpoint from before it (or of `--step`), in one process, or
under torchrun with as many processes as a replica has. Nothing of the run is changed. The gradient is that of the mean over the
replica's trained tokens: the step's, where there is one replica.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from step_megatron.checkpoint.directory import CheckpointError, checkpoint_root, steps_in
from step_megatron.checkpoint.distributed import load_model_weights, unwrap
from step_megatron.config.load import RUN_CONFIG, ConfigError, for_one_process, load_config
from step_megatron.model.weights import full_names
from step_megatron.runtime.device import Runtime, initialize, shutdown
from step_megatron.training.batch import TrainingBatch, to_device
from step_megatron.training.batch_dump import DumpedBatch, read_batch, sample_losses
from step_megatron.training.loop import run_schedule, supervised_loss
from step_megatron.training.state import TrainState, build_state


def replay(folder: Path, step: int | None = None, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a batch that `batch_dump.write_batch` wrote; every rank calls this.

    Args:
        folder: in `RUN/anomalies`.
        step: of the checkpoint to run it on; None for the newest from before it.
        overrides: `key=value` settings on top of the run's own.

    Returns:
        `then` (what the run recorded), `checkpoint`, `loss`, `samples` (id, source, loss now and then), `gradients` (norm and
        count of numbers that are not finite, by parameter, in the order of the model) and `first_non_finite`.

    Raises:
        DumpError, CheckpointError, ConfigError: something that this needs is not there, or does not fit.
    """
    dumped = read_batch(folder)
    run_dir = folder.absolute().parent.parent
    checkpoint = _checkpoint(run_dir, dumped.record["step"], step)
    config = load_config(run_dir / RUN_CONFIG, overrides)
    for section in (config.megatron.optimizer, config.megatron.ddp):
        # Every rank is to hold whole gradients.
        for name in ("use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce"):
            section.pop(name, None)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        config = for_one_process(config)
    runtime = initialize(config)
    try:
        if runtime.dp_size > 1:
            raise ConfigError(
                f"{runtime.world_size} processes are {runtime.dp_size} replicas; a dumped batch is one replica's: start "
                f"{runtime.world_size // runtime.dp_size}"
            )
        state = build_state(config, runtime.control_group, resumes=True)
        load_model_weights(state.model, checkpoint)
        groups = tuple(dict.fromkeys(group for batch in dumped.micro_batches for group in batch.groups))
        batches = [to_device(batch, dumped.clips, groups, config.encoder.width, runtime) for batch in dumped.micro_batches]
        return {"then": _then(dumped), "checkpoint": checkpoint.name} | _run(state, batches, dumped, len(groups), runtime)
    finally:
        shutdown()


def table(result: dict[str, Any], parameters: int = 20) -> str:
    """What `replay` returns, for reading: samples by loss and parameters by gradient norm, what is not finite first."""
    then = result["then"]
    lines = [
        f"step {then['step']} was out of order: {then['reason']}",
        f"on the weights of {result['checkpoint']}: loss {result['loss']:.6g} (then {float(then['loss']):.6g})",
        "",
        "loss now    then        sample",
    ]
    for sample in sorted(result["samples"], key=lambda sample: _badness(sample["loss"])):
        lines.append(f"{_number(sample['loss']):11} {_number(sample['then']):11} {sample['id']} ({sample['source']})")
    lines += ["", "gradient    not finite  parameter"]
    ranked = sorted(result["gradients"].items(), key=lambda item: (-item[1]["not_finite"], _badness(item[1]["norm"])))
    lines += [f"{gradient['norm']:<11.5g} {gradient['not_finite']:<11} {name}" for name, gradient in ranked[:parameters]]
    if len(ranked) > parameters:
        lines.append(f"... and {len(ranked) - parameters} more parameters")
    first = result["first_non_finite"]
    lines += ["", f"first parameter with a gradient that is not finite: {first}" if first else "every gradient is finite"]
    return "\n".join(lines)


def _run(state: TrainState, batches: list[TrainingBatch], dumped: DumpedBatch, groups: int, runtime: Runtime) -> dict[str, Any]:
    scale = dumped.record["loss_scale"]
    state.transformer.grad_scale_func = lambda loss: loss * scale
    for chunk in state.model:
        chunk.zero_grad_buffer()
    reports = run_schedule(state.model, batches, supervised_loss(groups))
    losses = sample_losses(batches, reports, runtime)
    samples = [
        {"id": name, "source": group.source, "loss": now, "then": None if before is None else float(before)}
        for batch, told, means in zip(dumped.micro_batches, dumped.record["micro_batches"], losses, strict=True)
        for name, group, now, before in zip(batch.sample_ids, batch.groups, means, told["losses"], strict=True)
    ]
    gradients = _gradients(state, scale)
    return {
        "loss": _mean_loss(reports, runtime),
        "samples": samples,
        "gradients": gradients,
        "first_non_finite": next((name for name, gradient in gradients.items() if gradient["not_finite"]), None),
    }


def _mean_loss(reports: list[dict[str, torch.Tensor]], runtime: Runtime) -> float:
    sums = torch.zeros(2, dtype=torch.float64)
    for report in reports if runtime.tp_rank == 0 else ():
        sums += report["sums"].sum(0).cpu()
    dist.all_reduce(sums, group=runtime.control_group)
    return (sums[0] / sums[1]).item()


def _gradients(state: TrainState, scale: float) -> dict[str, dict[str, float]]:
    """Norm, and count of what is not finite, of every trained parameter's gradient, over the ranks that share it."""
    own = {}
    for chunk in state.model:
        names = full_names(unwrap(chunk))
        for name, parameter in unwrap(chunk).named_parameters():
            # Context-parallel ranks and, for what is not cut, tensor-parallel ranks hold the same gradient.
            counted = tensor_parallel.param_is_not_tensor_parallel_duplicate(parameter)
            if parameter.requires_grad and counted and parallel_state.get_context_parallel_rank() == 0:
                gradient = parameter.main_grad.double() / scale
                own[names[name]] = (gradient.square().sum().item(), int((~gradient.isfinite()).sum()))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    together: dict[str, list[tuple[float, int]]] = {}
    for part in everyone:
        for name, value in part.items():
            together.setdefault(name, []).append(value)
    return {
        name: {"norm": math.sqrt(sum(square for square, _ in parts)), "not_finite": sum(count for _, count in parts)}
        for name, parts in together.items()
    }


def _checkpoint(run_dir: Path, before: int, step: int | None) -> Path:
    """The checkpoint of `step`, or the newest from before step `before`."""
    there = steps_in(checkpoint_root(run_dir))
    fitting = [number for number in there if (number == step if step is not None else number < before)]
    if not fitting:
        wanted = f"of step {step}" if step is not None else f"from before step {before}"
        raise CheckpointError(f"{run_dir}: no checkpoint {wanted}; --step names one of {sorted(there)}")
    return there[max(fitting)]


def _then(dumped: DumpedBatch) -> dict[str, Any]:
    return {name: value for name, value in dumped.record.items() if name != "micro_batches"}


def _badness(value: float | None) -> float:
    """For sorting, worst first."""
    if value is None:
        return math.inf
    return -value if math.isfinite(value) else -math.inf


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"
