"""Audio-centric mid-training, equation 1 of the Step-Audio-R1.5 report: one supervised objective over a mixture of sources."""

from typing import Any

from step_megatron.config.schema import Config
from step_megatron.training.stage import run_stage


def midtrain(config: Config) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; arguments, result and errors as `stage.run_stage`."""
    return run_stage(config, "midtrain")
