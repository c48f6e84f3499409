"""What training changes: this rank's model chunks, their optimizer and its schedule, built from a configuration."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from step_megatron.checkpoint.directory import CheckpointError, latest_checkpoint
from step_megatron.checkpoint.distributed import load_model_weights, saved_names
from step_megatron.config.schema import Config
from step_megatron.model.audio_lm import AudioLanguageModel, Head, build_model
from step_megatron.model.decoder import transformer_config
from step_megatron.model.freeze import freeze
from step_megatron.model.lora import is_adapter
from step_megatron.model.value_head import is_value_head
from step_megatron.training import optimizer as optimizers
from step_megatron.training.schedule import build_scheduler


@dataclass
class TrainState:
    """Attributes:
    model: one chunk, or one per virtual pipeline stage, wrapped for data parallelism.
    """

    transformer: TransformerConfig
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def build_state(
    config: Config, control_group: dist.ProcessGroup | None = None, resumes: bool = False, head: Head = "language"
) -> TrainState:
    """Build everything that a training step changes, the weights drawn or those of `model.weights`; needs `runtime.initialize`.

    Args:
        control_group: `Runtime.control_group`, over which `model.freeze` is checked against the whole model.
        resumes: a checkpoint of the run itself will be loaded next, so `model.weights` is not read.
        head: what the model ends in; a value head that `model.weights` does not have begins at zero.

    Raises:
        ConfigError, ValueError: settings that Megatron does not have or refuses; the message names the key.
        CheckpointError: `model.weights` has no checkpoint, or one of another model (of adapters that this run does not have).
    """
    transformer = transformer_config(config)
    optimizer_config = optimizers.build_optimizer_config(config.megatron, transformer)
    chunks = build_model(config, transformer, head)
    if config.model.weights and not resumes:
        # Before the optimizer copies them into its own precision.
        load_start(chunks, config)
    freeze(chunks, config.model.freeze, control_group)
    model = optimizers.wrap_data_parallel(chunks, transformer, optimizers.build_ddp_config(config.megatron))
    optimizer = optimizers.build_optimizer(optimizer_config, model)
    scheduler = build_scheduler(config.training, optimizer_config, optimizer)
    optimizers.connect_gradients(transformer, model, optimizer)
    return TrainState(transformer, model, optimizer, scheduler)


def load_start(chunks: list[AudioLanguageModel], config: Config) -> None:
    """Load the weights of `model.weights`; adapters and a value head, of which they have none, begin anew."""
    directory = config.model.weights
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        raise CheckpointError(f"model.weights: {directory} has no checkpoint; give a run, or what `convert import` wrote")
    names = saved_names(checkpoint)
    adapted, valued = any(map(is_adapter, names)), any(map(is_value_head, names))
    if adapted and not config.model.lora.rank:
        raise CheckpointError(
            f"model.weights: {directory} was trained with LoRA, and this run has none (model.lora.rank=0); keep its model.lora, "
            "or start from its weights merged (`convert export`, then `convert import`)"
        )

    def begins_anew(name: str) -> bool:
        return (is_adapter(name) and not adapted) or (is_value_head(name) and not valued)

    load_model_weights(chunks, checkpoint, without=begins_anew)
