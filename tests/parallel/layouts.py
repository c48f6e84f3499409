"""Runs on every rank of a worker pool: the real training step on synthetic micro-batches, in any layout, as full tensors."""

from contextlib import closing
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from parallel.synthetic import ENCODER_WIDTH, GROUPS, VOCABULARY, pack, step_segments

from step_megatron.config.schema import (
    AdaptorConfig,
    Config,
    EncoderConfig,
    LoRAConfig,
    MegatronConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from step_megatron.runtime import seeds

OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.1, "min_lr": 0.05, "sgd_momentum": 0.9, "weight_decay": 0.01, "clip_grad": 1.0},
    "adam": {"optimizer": "adam", "lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.1, "clip_grad": 1.0},
}
STEPS = 3


def small_config(
    transformer: dict[str, Any],
    optimizer: dict[str, Any],
    ddp: dict[str, Any] | None = None,
    freeze: tuple[str, ...] = (),
    tied: bool = False,
    vocabulary: int = VOCABULARY,
    lora: dict[str, Any] | None = None,
    max_positions: int = 256,
) -> Config:
    """A small model: 4 layers, width 64."""
    sizes = {
        "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
        "layernorm_epsilon": 1e-6, "init_method_std": 0.05,
    }  # fmt: skip
    return Config(
        run=RunConfig(device="cpu", threads=1, seed=7),
        model=ModelConfig(
            preset="test",
            vocabulary_size=vocabulary,
            max_positions=max_positions,
            rotary_base=1e4,
            tie_embeddings=tied,
            freeze=list(freeze),
            lora=LoRAConfig(**lora or {}),
        ),
        encoder=EncoderConfig(mels=8, width=ENCODER_WIDTH, layers=1, heads=2, ffn_width=48),
        adaptor=AdaptorConfig(width=32),
        training=TrainingConfig(steps=STEPS, micro_batches_per_step=4),
        megatron=MegatronConfig(transformer=sizes | transformer, optimizer=optimizer, ddp=ddp or {}),
    )


def train(
    rank: int,
    world_size: int,
    *,
    transformer: dict,
    optimizer: str,
    ddp: dict | None = None,
    packed: bool = True,
    freeze: tuple[str, ...] = (),
    steps: int = STEPS,
    **model: Any,
) -> dict:
    """Train a few steps in one layout.

    Returns:
        `lines` of metrics, one a step; `gradients` of the first step and `parameters` after the last, full tensors by full name,
        the same on every rank.
    """
    from step_megatron.runtime.device import initialize
    from step_megatron.training.optimizer import settled_parameters

    config = small_config(transformer, OPTIMIZERS[optimizer], ddp, freeze, **model)
    runtime = initialize(config)
    state = lively_state(config)
    trainer = make_trainer(config, runtime, state, packed)
    captured: dict[str, torch.Tensor] = {}
    prepare_grads = state.optimizer.prepare_grads

    def prepare_after_capture():
        if not captured:
            captured.update(full_tensors(state.model, lambda parameter: parameter.main_grad, bool(ddp)))
        return prepare_grads()

    state.optimizer.prepare_grads = prepare_after_capture
    lines = [run_step(trainer) for _ in range(steps)]
    with settled_parameters(state.model):
        parameters = full_tensors(state.model, lambda parameter: parameter)
    return {"lines": lines, "gradients": captured, "parameters": parameters}


def lively_state(config: Config):
    """A training state whose biases, norms and adapters are not 0 and 1: one that is mapped, cut or reduced wrongly shows."""
    from megatron.core import parallel_state

    from step_megatron.model.lora import is_adapter
    from step_megatron.model.weights import cut_dimension, full_names, shard
    from step_megatron.runtime import device
    from step_megatron.training import state

    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()

    def build(*args):
        chunks = state_build_model(*args)
        for chunk in chunks:
            names = full_names(chunk)
            for local, parameter in chunk.named_parameters():
                name = names[local]
                if parameter.dim() == 1 or is_adapter(name):
                    full = list(parameter.shape)
                    if (dimension := cut_dimension(name)) is not None:
                        full[dimension] *= size
                    noise = 0.1 * torch.randn(full, generator=seeds.generator(3, name))
                    parameter.data.add_(shard(name, noise, rank, size))
        return chunks

    state_build_model = state.build_model
    with mock.patch.object(state, "build_model", build):
        return state.build_state(config, device.current().control_group)


def run_step(trainer) -> dict[str, float]:
    from step_megatron.training.loop import training_step
    from step_megatron.training.schedule import learning_rate

    training_step(trainer)
    return trainer.meter.flush(learning_rate(trainer.optimizer))


def make_trainer(config: Config, runtime, state, packed: bool = True):
    """A trainer whose next step's micro-batches are synthetic, shared out over the data-parallel ranks."""
    from step_megatron.training.anomalies import AnomalyGuard
    from step_megatron.training.batch import to_device
    from step_megatron.training.interruption import Interruption
    from step_megatron.training.loop import Trainer
    from step_megatron.training.meter import Meter

    def next_batches():
        groups, clips = step_segments(trainer.step)
        micro_batches = [pack(group) for group in groups] if packed else [segment for group in groups for segment in group]
        mine = micro_batches[runtime.dp_rank :: runtime.dp_size]
        return [to_device(batch, clips, GROUPS, ENCODER_WIDTH, runtime) for batch in mine]

    trainer = Trainer(
        config, runtime, state.model, state.optimizer, state.scheduler, GROUPS, next_batches, None,
        Meter(GROUPS, runtime, lambda batch: 0.0), lambda trainer, validation_loss: None, lambda step, values: None,
        lambda step, values: None, Interruption(dist.group.WORLD), AnomalyGuard(config.training.anomaly),
    )  # fmt: skip
    return trainer


def full_tensors(model, pick, sharded: bool = False) -> dict[str, torch.Tensor]:
    """One tensor per parameter, put together from all ranks, by full name.

    Args:
        pick: the tensor of a parameter.
        sharded: gradients were reduce-scattered (distributed optimizer): put the replicas' shards together first.
    """
    from megatron.core import parallel_state

    from step_megatron.checkpoint.distributed import unwrap
    from step_megatron.model.weights import full_names, merge

    if sharded:
        for chunk in model:
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    local = {}
    for chunk in model:
        inner = unwrap(chunk)
        names = full_names(inner)
        local |= {names[n]: pick(p).detach().clone() for n, p in inner.named_parameters() if p.requires_grad}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (parallel_state.get_tensor_model_parallel_rank(), local))
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for tp_rank, tensors in everyone:
        for name, tensor in tensors.items():
            parts.setdefault(name, {}).setdefault(tp_rank, tensor)
    return {name: merge(name, [by_rank[r] for r in sorted(by_rank)]) for name, by_rank in sorted(parts.items())}


def train_and_save(
    rank: int,
    world_size: int,
    *,
    transformer: dict,
    optimizer: str,
    steps: int,
    run_dir: str,
    ddp: dict | None = None,
    freeze=(),
    asynchronous: bool = True,
    **model,
) -> dict:
    """Train `steps` steps, save, train one more while it is written; that step's line, parameters at the save and after it."""
    from step_megatron.checkpoint.saving import Checkpoints
    from step_megatron.training.optimizer import settled_parameters

    trainer = prepare(transformer, optimizer, ddp, freeze, **model)
    with closing(Checkpoints(run_dir, asynchronous=asynchronous)) as checkpoints:
        for _ in range(steps):
            run_step(trainer)
        with settled_parameters(trainer.model):
            saved = full_tensors(trainer.model, lambda parameter: parameter)
            checkpoints.save(trainer.step, trainer.model, trainer.optimizer, trainer.scheduler, {"place": [trainer.step]})
        line = run_step(trainer)
        checkpoints.wait()
    with settled_parameters(trainer.model):
        return {"line": line, "saved": saved, "after": full_tensors(trainer.model, lambda parameter: parameter)}


def load_and_train(
    rank: int, world_size: int, *, transformer: dict, optimizer: str, run_dir: str, ddp: dict | None = None, freeze=(), **model
) -> dict:
    """Load the newest checkpoint of a run in this layout and train one step; the counterpart of `train_and_save`."""
    from step_megatron.checkpoint.directory import latest_checkpoint
    from step_megatron.checkpoint.distributed import load_checkpoint
    from step_megatron.training.optimizer import settled_parameters

    trainer = prepare(transformer, optimizer, ddp, freeze, **model)
    trainer.step, extra = load_checkpoint(latest_checkpoint(run_dir), trainer.model, trainer.optimizer, trainer.scheduler)
    loaded = full_tensors(trainer.model, lambda parameter: parameter)
    line = run_step(trainer)
    with settled_parameters(trainer.model):
        after = full_tensors(trainer.model, lambda parameter: parameter)
    return {"line": line, "saved": loaded, "after": after, "extra": extra}


def load_weights(rank: int, world_size: int, *, transformer: dict, directory: str) -> dict[str, torch.Tensor]:
    """Load the weights alone into a model that is not wrapped."""
    from step_megatron.checkpoint.distributed import load_model_weights
    from step_megatron.model.audio_lm import build_model
    from step_megatron.runtime.device import initialize

    config = small_config(transformer, OPTIMIZERS["adam"])
    initialize(config)
    model = build_model(config)
    load_model_weights(model, directory)
    return full_tensors(model, lambda parameter: parameter)


def prepare(transformer: dict, optimizer: str, ddp: dict | None, freeze: tuple[str, ...], **model):
    from step_megatron.runtime.device import initialize

    config = small_config(transformer, OPTIMIZERS[optimizer], ddp, freeze, **model)
    return make_trainer(config, initialize(config), lively_state(config))
