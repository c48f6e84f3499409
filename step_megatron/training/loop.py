"""The step loop: what happens in a training step, in order, and what surrounds it (metrics, validation, checkpoints, stopping).

batches   = packed micro-batches of this replica, audio encoded, unreadable clips agreed by all ranks, on the device
gradients = Megatron's schedule (no pipelining, 1F1B or interleaved) over them; sums over tokens
finalize  = reduce over replicas, divide by the trained tokens of the whole step
update    = learning rate of this step, clip, optimizer
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.runtime.device import Runtime
from step_megatron.training.batch import TrainingBatch
from step_megatron.training.interruption import Interruption
from step_megatron.training.loss import masked_loss
from step_megatron.training.meter import Meter
from step_megatron.training.schedule import learning_rate


@dataclass
class Trainer:
    """Everything that a step needs.

    Attributes:
        model: this rank's chunks (one per virtual pipeline stage), wrapped for data parallelism.
        groups: what losses are summed by.
        next_batches: the micro-batches of the next step; every replica gets the same number.
        validation_batches: micro-batches of the validation set, the same at every call; None when none is configured.
        meter: sums up what a step did, between two lines of metrics.
        save: writes a checkpoint of the current step, or begins to; takes the validation loss, if it was measured at this step.
        saved: waits until the last checkpoint is complete; raises `CheckpointError` if it could not be written.
        report: takes the step and the values of one line of metrics.
        advance: called once a step, for the progress display.
        close: ends what `report` writes to.
    """

    config: Config
    runtime: Runtime
    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    groups: tuple[LossGroup, ...]
    next_batches: Callable[[], list[TrainingBatch]]
    validation_batches: Callable[[], list[TrainingBatch]] | None
    meter: Meter
    save: Callable[["Trainer", float | None], None]
    report: Callable[[int, dict[str, float]], None]
    advance: Callable[[int, dict[str, float]], None]
    interruption: Interruption
    saved: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    step: int = 0
    last: dict[str, float] = field(default_factory=dict)


def training_step(trainer: Trainer) -> None:
    """One optimizer step over the micro-batches of all replicas."""
    started = time.perf_counter()
    batches = trainer.next_batches()
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = run_schedule(trainer.model, batches, len(trainer.groups))
    trainer.scheduler.step(1)
    updated, gradient_norm, _ = trainer.optimizer.step()
    trainer.step += 1
    trainer.meter.add(batches, reports, gradient_norm, updated, time.perf_counter() - started)


def run_schedule(
    model: list[torch.nn.Module], batches: list[TrainingBatch], groups: int, forward_only: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Run Megatron's schedule for this layout over the micro-batches.

    Returns:
        The reports of `loss.masked_loss`, one per micro-batch, on last-stage ranks; nothing on the others.
    """
    iterators = [iter(batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, groups),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        # Packed micro-batches announce their own length to the next stage (`variable_seq_lengths`); this value is not used.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _forward_step(groups: int, batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
    batch = next(batches)
    return model(batch.model), partial(masked_loss, loss_mask=batch.loss_mask, group=batch.group, groups=groups)


@torch.no_grad()
def validation_loss(trainer: Trainer) -> dict[str, float]:
    """Mean loss per trained token of the validation set, in total, per source and per aspect."""
    for chunk in trainer.model:
        chunk.eval()
    sums = trainer.meter.reduce_losses(run_schedule(trainer.model, trainer.validation_batches(), len(trainer.groups), True))
    for chunk in trainer.model:
        chunk.train()
    return {f"validation_{name}": value for name, value in sums.items()}


def train(trainer: Trainer) -> None:
    """Step until the run's last step, or until a signal asks to stop; saves, validates and reports on the way."""
    training, log_interval = trainer.config.training, trainer.config.run.log_interval
    stopping = False
    while trainer.step < training.steps and not stopping:
        training_step(trainer)
        step, last = trainer.step, trainer.step == training.steps
        stopping = trainer.interruption.agreed()
        saving = last or stopping or _due(step, training.save_interval)
        validating = trainer.validation_batches is not None and (last or _due(step, training.validation_interval))
        measured: dict[str, float] = {}
        if last or validating or _due(step, log_interval):
            values = trainer.meter.flush(learning_rate(trainer.optimizer))
            measured = validation_loss(trainer) if validating else {}
            values |= measured
            trainer.report(step, values)
            trainer.last |= values
        if saving:
            trainer.save(trainer, measured.get("validation_loss"))
        trainer.advance(step, trainer.last)
    trainer.saved()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
