"""What training changes: this rank's model chunks, their optimizer and its schedule, built from a configuration."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from step_megatron.config.schema import Config
from step_megatron.model.audio_lm import build_model
from step_megatron.model.decoder import transformer_config
from step_megatron.model.freeze import freeze
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


def build_state(config: Config, control_group: dist.ProcessGroup | None = None) -> TrainState:
    """Build everything that a training step changes; needs `runtime.initialize(config)`.

    Args:
        control_group: `Runtime.control_group`, over which `model.freeze` is checked against the whole model.

    Raises:
        ConfigError, ValueError: settings that Megatron does not have or refuses; the message names the key.
    """
    transformer = transformer_config(config)
    optimizer_config = optimizers.build_optimizer_config(config.megatron, transformer)
    chunks = build_model(config, transformer)
    freeze(chunks, config.model.freeze, control_group)
    model = optimizers.wrap_data_parallel(chunks, transformer, optimizers.build_ddp_config(config.megatron))
    optimizer = optimizers.build_optimizer(optimizer_config, model)
    scheduler = build_scheduler(config.training, optimizer_config, optimizer)
    optimizers.connect_gradients(transformer, model, optimizer)
    return TrainState(transformer, model, optimizer, scheduler)
