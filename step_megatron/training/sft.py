"""Cold-start supervised fine-tuning, section 3.2 of the Step-Audio-R1.5 report: multi-turn dialogues, on top of mid-training.

The objective is mid-training's. What differs is in the data and its settings: dialogues with audio in any turn, tagged with the
aspect that they exercise (`data.aspects`); `data.train_turns` and `tokenizer.earlier_reasoning` say which turns are trained and
what they see of earlier ones; `data.filters` leaves out what a teacher should not have written; `training.epochs` is usually 1.
"""

from typing import Any

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.training.stage import run_stage


def sft(config: Config) -> dict[str, Any]:
    """Fine-tune, or go on with, the run of `config.run.dir`; result and errors as `stage.run_stage`.

    Raises:
        ConfigError: also where no model is named to start from.
    """
    if not config.model.weights:
        raise ConfigError(
            "model.weights is not set: name the folder of the run that SFT starts from, or one that `convert import` wrote"
        )
    return run_stage(config, "sft")
