"""Training of the generative reward model (3.3 of the Step-Audio-R1.5 report): the supervised stage on judgments written out.

Its sources are conversations that `step-megatron data from-preferences` wrote: a judge's prompt, then reasoning and JSON verdict.
"""

from typing import Any

from step_megatron.config.schema import Config
from step_megatron.training.stage import run_stage


def train_reward(config: Config) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; arguments, result and errors as `stage.run_stage`."""
    return run_stage(config, "reward")
