"""The step loop: what happens in a training step, in order, and what surrounds it (metrics, validation, checkpoints, stopping).

batches   = packed micro-batches of this replica, audio encoded, unreadable clips agreed by all ranks, on the device
gradients = Megatron's schedule (no pipelining, 1F1B or interleaved) over them; sums over tokens
finalize  = reduce over replicas, divide by the trained tokens of the whole step
exchange  = losses, gradient norm and signals to all ranks: is the step in order, does the run stop?
update    = learning rate of this step, clip, optimizer; left out where the step is an anomaly
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.metrics import strict_number
from step_megatron.runtime.progress import get_logger
from step_megatron.training.anomalies import AnomalyGuard, TrainingAnomaly
from step_megatron.training.batch import TrainingBatch
from step_megatron.training.batch_dump import sample_losses, write_batch
from step_megatron.training.exchange import StepFacts, exchange, start_copy_to_host
from step_megatron.training.interruption import Interruption
from step_megatron.training.loss import masked_loss
from step_megatron.training.meter import Meter
from step_megatron.training.optimizer import apply_update, gradient_norm, loss_scale_is_smallest
from step_megatron.training.schedule import learning_rate
from step_megatron.training.watchdog import Heartbeat

logger = get_logger(__name__)


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
        guard: tells which steps are out of order.
        heartbeat: says where this rank is.
        rewind: goes back to the last checkpoint, but for the data.
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
    guard: AnomalyGuard
    saved: Callable[[], None] = lambda: None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    rewind: Callable[["Trainer"], None] = lambda trainer: None
    close: Callable[[], None] = lambda: None
    step: int = 0
    last: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a step: what all ranks know of it; what is wrong with it, if anything, and where its batch was written."""

    facts: StepFacts
    anomaly: str | None = None
    folder: Path | None = None


def training_step(trainer: Trainer) -> Outcome:
    """One optimizer step over the micro-batches of all replicas."""
    started = time.perf_counter()
    trainer.heartbeat.next_turn(trainer.step + 1)
    batches = trainer.next_batches()
    trainer.heartbeat.beat("compute")
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    reports = run_schedule(trainer.model, batches, supervised_loss(len(trainer.groups)), beat=trainer.heartbeat.beat)
    sums = start_copy_to_host(trainer.meter.local_sums(reports))
    trainer.scheduler.step(1)
    norm = gradient_norm(trainer.optimizer)
    trainer.heartbeat.beat("exchange")
    facts = exchange(sums, norm, trainer.interruption.received, trainer.interruption.group)
    overflow_is_final = facts.gradient_norm is None and loss_scale_is_smallest(trainer.optimizer)
    anomaly = trainer.guard.examine(trainer.step + 1, facts, overflow_is_final)
    trainer.heartbeat.beat("update")
    updated = anomaly is None and norm is not None
    if updated:
        apply_update(trainer.optimizer, norm)
    trainer.step += 1
    trainer.meter.add(batches, facts, updated, anomaly is not None, time.perf_counter() - started)
    if anomaly is None:
        return Outcome(facts)
    folder = _write_down(trainer, batches, reports, facts, anomaly)
    logger.warning("step %d is out of order: %s; its batch is in %s", trainer.step, anomaly, folder)
    return Outcome(facts, anomaly, folder)


def _write_down(
    trainer: Trainer,
    batches: list[TrainingBatch],
    reports: list[dict[str, torch.Tensor]],
    facts: StepFacts,
    anomaly: str,
) -> Path:
    """Write down the batch of a step that was out of order, for `training.replay`; where this replica's part of it is."""
    record = {
        "step": trainer.step,
        "number": trainer.guard.count,
        "reason": anomaly,
        "loss": strict_number(facts.loss),
        "gradient_norm": strict_number(facts.gradient_norm),
        "loss_scale": float(trainer.optimizer.get_loss_scale()),
        "seed": trainer.config.run.seed,
    }
    losses = sample_losses(batches, reports, trainer.runtime)
    return write_batch(trainer.config.run.dir, batches, losses, trainer.runtime, record)


def run_schedule(
    model: list[torch.nn.Module],
    batches: Sequence[Any],
    loss: Callable[[Any], Callable],
    forward_only: bool = False,
    beat: Callable[[], None] = lambda: None,
) -> list[dict[str, torch.Tensor]]:
    """Run Megatron's schedule for this layout over the micro-batches.

    Args:
        batches: each with a `model` attribute, which the model reads.
        loss: of a micro-batch, the function that makes of the model's output the summed loss, the number of tokens that it is
            summed over, and a report.
        beat: called before each micro-batch.

    Returns:
        The reports, one per micro-batch, on last-stage ranks; nothing on the others.
    """
    iterators = [iter(batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, loss, beat),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        # Packed micro-batches announce their own length to the next stage (`variable_seq_lengths`); this value is not used.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def supervised_loss(groups: int) -> Callable[[TrainingBatch], Callable]:
    """`run_schedule`'s loss of a supervised stage; `groups` is the number of groups that losses are summed by."""
    return lambda batch: partial(masked_loss, loss_mask=batch.loss_mask, group=batch.group, groups=groups)


def _forward_step(
    loss: Callable[[Any], Callable], beat: Callable[[], None], batches: Any, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable]:
    beat()
    batch = next(batches)
    return model(batch.model), loss(batch)


@torch.no_grad()
def validation_loss(trainer: Trainer) -> dict[str, float]:
    """Mean loss per trained token of the validation set, in total, per source and per aspect."""
    trainer.heartbeat.beat("validate")
    for chunk in trainer.model:
        chunk.eval()
    batches = trainer.validation_batches()
    loss = supervised_loss(len(trainer.groups))
    reports = run_schedule(trainer.model, batches, loss, forward_only=True, beat=trainer.heartbeat.beat)
    sums = trainer.meter.reduce_losses(reports)
    for chunk in trainer.model:
        chunk.train()
    return {f"validation_{name}": value for name, value in sums.items()}


def train(trainer: Trainer) -> None:
    """Step until the run's last step, or until a signal asks to stop; saves, validates and reports on the way.

    Raises:
        TrainingAnomaly: a step was out of order, and the run's settings have it stop; on every rank.
    """
    training, log_interval = trainer.config.training, trainer.config.run.log_interval
    if trainer.step == 0 and training.anomaly.action == "rewind":
        # There has to be something to go back to.
        trainer.save(trainer, None)
    stopping = False
    while trainer.step < training.steps and not stopping:
        outcome = training_step(trainer)
        stopping = trainer.interruption.heed(outcome.facts.signal)
        if outcome.anomaly is not None and _goes_back(trainer, outcome):
            trainer.advance(trainer.step, trainer.last)
            continue
        step, last = trainer.step, trainer.step == training.steps
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
            trainer.heartbeat.beat("save")
            trainer.save(trainer, measured.get("validation_loss"))
        trainer.advance(step, trainer.last)
    trainer.heartbeat.beat("save")
    trainer.saved()


def _goes_back(trainer: Trainer, outcome: Outcome) -> bool:
    """Answer an anomaly as the settings have it: whether the run went back to its last checkpoint."""
    settings, guard, step = trainer.config.training.anomaly, trainer.guard, trainer.step
    if settings.action != "skip" or guard.exhausted:
        trainer.saved()
    if settings.action == "stop" or guard.exhausted:
        many = f", number {guard.in_a_row} in a row (training.anomaly.max_in_a_row)" if guard.exhausted else ""
        raise TrainingAnomaly(
            f"step {step} is out of order{many}: {outcome.anomaly}. The last checkpoint stands. Look at the step's batch with "
            f"`step-megatron train replay {outcome.folder}`; then go on with the same command and training.anomaly.action=skip "
            "or rewind, with a lower learning rate, or without the samples that are at fault"
        )
    if settings.action == "rewind":
        trainer.rewind(trainer)
        logger.warning("back at step %d; the batches of steps %d to %d are left out", trainer.step, trainer.step + 1, step)
    return settings.action == "rewind"


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
