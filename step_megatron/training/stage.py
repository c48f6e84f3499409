"""A training stage, from a configuration to a trained run: `run_stage(config, name)` under torchrun or in one process.

What every supervised stage shares is assembled here; a stage's own file (`midtrain`, ...) says what is its own.

A run directory holds all there is to know about a run:

    config.yaml, run.json      the resolved configuration; versions, layout and seed
    metrics.jsonl, tensorboard one line every `run.log_interval` steps
    checkpoints/               see `checkpoint.directory`
    quarantine.jsonl           clips that failed while training, samples that are left out
    anomalies/                 batches of steps that were out of order, see `training.anomalies`
    hangs/                     stacks of a run that hung, see `training.watchdog`

Calling it again on the same directory goes on from the newest checkpoint: the same batches, the same numbers as without the stop.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.audio.cache import EncodedClip
from step_megatron.audio.encode_once import EncodedAudio
from step_megatron.audio.index import AudioIndex
from step_megatron.checkpoint.directory import Retention, latest_checkpoint
from step_megatron.checkpoint.distributed import load_checkpoint
from step_megatron.checkpoint.recovery import newest_good
from step_megatron.checkpoint.saving import Checkpoints
from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.data.loader import MixtureLoader
from step_megatron.data.micro_batch import MicroBatch
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.model.lora import is_adapter
from step_megatron.runtime.device import Runtime, initialize, shutdown, store_client
from step_megatron.runtime.flops import device_peak, encoder_work, precision, training_flops
from step_megatron.runtime.metrics import MetricsWriter
from step_megatron.runtime.progress import Progress, get_logger
from step_megatron.training.anomalies import AnomalyGuard
from step_megatron.training.batch import TrainingBatch, to_device
from step_megatron.training.encoding import clips_of, encoded_audio, passes_over
from step_megatron.training.interruption import Interruption
from step_megatron.training.loop import Trainer, train
from step_megatron.training.meter import Meter
from step_megatron.training.optimizer import settled_parameters
from step_megatron.training.record import check_record, write_record
from step_megatron.training.state import TrainState, build_state
from step_megatron.training.watchdog import Heartbeat, Watchdog

logger = get_logger(__name__)


def run_stage(config: Config, name: str) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; every rank calls this.

    Args:
        name: of the stage, for the progress line.

    Returns:
        `run_dir`, `checkpoint`, `steps`, `seconds` of this call, `interrupted` (a signal's name, or None), and the last line of
        metrics; the same on every rank.

    Raises:
        ConfigError, ValueError: settings or data that cannot be used; the message names the key or the file.
    """
    started = time.perf_counter()
    runtime = initialize(config)
    try:
        group = dist.group.WORLD if runtime.backend == "gloo" else dist.new_group(backend="gloo", timeout=runtime.timeout)
        with Interruption(group) as interruption, closing(build_trainer(config, runtime, interruption)) as trainer:
            run(trainer, name)
        return {
            "run_dir": config.run.dir,
            "checkpoint": str(latest_checkpoint(config.run.dir)),
            "steps": trainer.step,
            "seconds": round(time.perf_counter() - started, 3),
            "interrupted": interruption.signal_name,
            **trainer.last,
        }
    finally:
        shutdown()


def build_trainer(config: Config, runtime: Runtime, interruption: Interruption) -> Trainer:
    """Everything of a run, at the step of its newest checkpoint or at step 0; collective over all ranks."""
    if not config.data.sources:
        raise ConfigError("data.sources is empty; name at least one source: [{name: speech, path: train.jsonl, weight: 1}]")
    tokenizer = load_tokenizer(config)
    checkpoint = newest_good(config.run.dir, refuse_damaged=config.training.damaged_checkpoint == "refuse")
    # Before anything takes long: it is an error where nothing can be written.
    checkpoints = _checkpoints(config, runtime)
    index = AudioIndex.load(config.data.index) if config.data.index else None
    loader, validation = _loaders(config, tokenizer, index, runtime)
    if config.training.epochs:
        steps = loader.steps_in(config.training.epochs)
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
        logger.info("training.epochs=%g: %d steps", config.training.epochs, steps)
    if checkpoint is not None:
        check_record(config, runtime)
    clips = loader.sources.clips + (validation.sources.clips if validation else 0)
    audio = encoded_audio(config, runtime, index, passes_over(config, loader, validation), clips) if clips else None
    if audio is not None and audio.cache is not None:
        # Told to stop, the run goes on to the end of its first step, where all ranks agree on it; the clips so far are kept.
        audio.prepare(clips_of(loader, validation), stop=lambda: bool(interruption.received))
    state = build_state(config, runtime.control_group, resumes=checkpoint is not None)
    guard, heartbeat = AnomalyGuard(config.training.anomaly), Heartbeat()
    groups = tuple(dict.fromkeys([*loader.groups, *(validation.groups if validation else ())]))
    meter = Meter(
        groups,
        runtime,
        flops_of(config, state),
        device_peak(runtime.device, precision(config.megatron.transformer)),
        encoder_flops=lambda: encoder_work(config.encoder, audio.encoded_frames).forward if audio else 0,
        samples_left_out=lambda: len(loader.sources.left_out),
        anomalies=lambda: guard.count,
        loss_scale=(lambda: state.optimizer.get_loss_scale().item()) if state.transformer.fp16 else None,
    )
    step = 0
    if checkpoint is not None:
        step, extra = load_checkpoint(checkpoint, state.model, state.optimizer, state.scheduler, verified=True)
        loader.load_state_dict(extra["loader"])
        meter.load_state_dict(extra["meter"])
        guard.load_state_dict(extra["anomalies"])
        if audio is not None:
            audio.recall(extra["failed_clips"])
        logger.info("going on from %s", checkpoint)
    on_device = partial(_on_device, audio=audio, groups=groups, encoder_width=config.encoder.width, runtime=runtime)
    metrics = MetricsWriter(config.run.dir, config, step)
    ending = ExitStack()
    ending.callback(checkpoints.close)
    ending.callback(metrics.close)
    return Trainer(
        config=config,
        runtime=runtime,
        model=state.model,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        groups=groups,
        next_batches=partial(_next_batches, loader, on_device, heartbeat),
        validation_batches=_validation_batches(validation, on_device) if validation else None,
        meter=meter,
        save=partial(_save, checkpoints=checkpoints, loader=loader, audio=audio, metrics=metrics),
        saved=checkpoints.wait,
        report=metrics.write,
        advance=lambda step, values: None,
        interruption=interruption,
        guard=guard,
        heartbeat=heartbeat,
        rewind=partial(_rewind, metrics=metrics),
        close=ending.close,
        step=step,
    )


def run(trainer: Trainer, name: str) -> None:
    """Train to the end, with a record of the run and a progress line."""
    config, runtime = trainer.config, trainer.runtime
    if trainer.step >= config.training.steps:
        logger.info("%s has all of its %d steps; raise training.steps to go on", config.run.dir, config.training.steps)
        return
    if runtime.rank == 0:
        write_record(config, runtime)
    watchdog = Watchdog(
        trainer.heartbeat,
        store_client("watchdog"),
        runtime.rank,
        runtime.world_size,
        config.run.dir,
        config.training.hang_timeout_seconds,
    )
    with watchdog, Progress(config.training.steps, name, "steps", done=trainer.step) as bar:

        def advance(step: int, values: dict[str, float]) -> None:
            bar.update(step - bar.done, f"loss {values['loss']:.4f}" if "loss" in values else "")

        trainer.advance = advance
        train(trainer)
    if trainer.interruption.signal_name:
        logger.warning(
            "%s: stopped at step %d and saved; run the same command again to go on",
            trainer.interruption.signal_name,
            trainer.step,
        )


def load_tokenizer(config: Config) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        ConfigError: none is named, or it has more tokens than the model has rows.
    """
    if not config.tokenizer.path:
        raise ConfigError("tokenizer.path is not set; give the folder that `step-megatron data build` wrote, or one of Qwen's")
    tokenizer = Tokenizer.load(config.tokenizer.path)
    if tokenizer.size > config.model.vocabulary_size:
        raise ConfigError(
            f"model.vocabulary_size={config.model.vocabulary_size} is smaller than the {tokenizer.size} tokens of "
            f"{config.tokenizer.path}; raise it"
        )
    return tokenizer


def flops_of(config: Config, state: TrainState) -> Callable[[TrainingBatch], int]:
    """Operations that training on a micro-batch needs, given what is frozen (on any rank: a stage alone may have no adaptor)."""
    names = [name for chunk in state.model for name, parameter in chunk.named_parameters() if parameter.requires_grad]
    flags = torch.tensor(
        [any("adaptor" not in name and not is_adapter(name) for name in names), any("adaptor" in name for name in names)],
        dtype=torch.int32,
    )
    flags = flags.to(next(state.model[0].parameters()).device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    decoder_trained, adaptor_trained = (bool(flag) for flag in flags.tolist())

    def flops(batch: TrainingBatch) -> int:
        *lengths, last = batch.model.packed.segment_lengths
        segments = [*lengths, max(0, last - batch.padding)]
        return training_flops(
            config,
            segments,
            batch.model.encoder_frames,
            decoder_trained=decoder_trained,
            adaptor_trained=adaptor_trained,
            predicted=batch.trained,
        )

    return flops


def _on_device(
    micro_batches: list[MicroBatch],
    audio: EncodedAudio | None,
    groups: tuple[LossGroup, ...],
    encoder_width: int,
    runtime: Runtime,
) -> list[TrainingBatch]:
    """Fetch the clips of a replica's micro-batches (collective), and put the micro-batches on the device."""
    clips: Mapping[str, EncodedClip | None] = {}
    if audio is not None:
        clips = audio.fetch([span.address for batch in micro_batches for span in batch.audio])
    return [to_device(batch, clips, groups, encoder_width, runtime) for batch in micro_batches]


def _loaders(
    config: Config, tokenizer: Tokenizer, index: AudioIndex | None, runtime: Runtime
) -> tuple[MixtureLoader, MixtureLoader | None]:
    """The training loader, and the validation loader if there is one: one step of it is one measurement."""
    place = (runtime.dp_rank, runtime.dp_size, runtime.device.type == "cuda")
    quarantine = Path(config.run.dir) / "quarantine.jsonl"
    training = MixtureLoader(config, tokenizer, index, *place, quarantine=quarantine)
    if not config.data.validation:
        return training, None
    return training, MixtureLoader(config, tokenizer, index, *place, validation=True, quarantine=quarantine)


def _validation_batches(
    loader: MixtureLoader, on_device: Callable[[list[MicroBatch]], list[TrainingBatch]]
) -> Callable[[], list[TrainingBatch]]:
    """The same micro-batches at every call; only their plan is kept, not their audio."""
    micro_batches = loader.next_step()
    return lambda: on_device(micro_batches)


def _checkpoints(config: Config, runtime: Runtime) -> Checkpoints:
    training = config.training
    retention = Retention(training.keep_checkpoints, training.keep_checkpoint_every, training.keep_best_checkpoint)
    return Checkpoints(config.run.dir, retention, training.async_save, runtime.timeout)


def _next_batches(
    loader: MixtureLoader, on_device: Callable[[list[MicroBatch]], list[TrainingBatch]], heartbeat: Heartbeat
) -> list[TrainingBatch]:
    micro_batches = loader.next_step()
    heartbeat.beat("encode")
    return on_device(micro_batches)


def _save(
    trainer: Trainer,
    validation_loss: float | None,
    checkpoints: Checkpoints,
    loader: MixtureLoader,
    audio: EncodedAudio | None,
    metrics: MetricsWriter,
) -> None:
    # What the checkpoint's steps have said stays said, whatever happens next.
    metrics.flush()
    extra = {
        "loader": loader.state_dict(),
        "meter": trainer.meter.state_dict(),
        "anomalies": trainer.guard.state_dict(),
        "failed_clips": dict(audio.failures) if audio else {},
    }
    with settled_parameters(trainer.model):
        checkpoints.save(trainer.step, trainer.model, trainer.optimizer, trainer.scheduler, extra, validation_loss)


def _rewind(trainer: Trainer, metrics: MetricsWriter) -> None:
    """Back to the run's last checkpoint in everything but the data, which moves on, and the count of anomalies."""
    checkpoint = latest_checkpoint(trainer.config.run.dir)
    # Megatron's scheduler adds the saved number of steps to its own.
    trainer.scheduler.num_steps = 0
    with settled_parameters(trainer.model):
        trainer.step, extra = load_checkpoint(checkpoint, trainer.model, trainer.optimizer, trainer.scheduler)
    trainer.meter.load_state_dict(extra["meter"])
    trainer.guard.load_history(extra["anomalies"])
    metrics.go_back(trainer.step)
