"""Which engine makes the rollouts of a run."""

from step_megatron.config.schema import Config
from step_megatron.generation.engine import Engine
from step_megatron.generation.sequence import Sequence
from step_megatron.generation.vllm_backend import Request, VLLMEngine
from step_megatron.model.audio_lm import AudioLanguageModel

# What a rollout needs of an engine: `add`, `running`, `step`, `idle`, `cancel`, `generate`, `weights_changed`, `release_cache`.
RolloutEngine = Engine | VLLMEngine
# A sample on its way, with `done` and `result`.
Sample = Sequence | Request


def rollout_engine(model: AudioLanguageModel, config: Config) -> RolloutEngine:
    """The engine of `rl.rollout.backend`, whose samples train the policy that `model` is."""
    if config.rl.rollout.backend == "vllm":
        return VLLMEngine(model, config, for_policy=True)
    return Engine(model, config.generation, for_policy=True)
