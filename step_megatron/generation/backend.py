"""Which engine makes the rollouts of a run."""

from step_megatron.config.schema import Config
from step_megatron.generation.engine import Engine
from step_megatron.generation.interface import RolloutEngine
from step_megatron.generation.vllm_backend import VLLMEngine
from step_megatron.model.audio_lm import AudioLanguageModel


def rollout_engine(model: AudioLanguageModel, config: Config) -> RolloutEngine:
    """The engine of `rl.rollout.backend`, whose samples train the policy that `model` is."""
    if config.rl.rollout.backend == "vllm":
        return VLLMEngine(model, config, for_policy=True)
    return Engine(model, config.generation, for_policy=True)
