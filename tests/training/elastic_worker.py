"""What torchrun's agent starts in a test: the command line, in a process that kills itself once, in the first of its lives."""

import os
import signal
from unittest import mock


def main(*settings: str) -> int:
    from step_megatron import cli
    from step_megatron.training import loop

    step = loop.training_step

    def step_or_die(trainer):
        if trainer.step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    with mock.patch.object(loop, "training_step", step_or_die):
        return cli.main(["train", "midtrain", *settings])
