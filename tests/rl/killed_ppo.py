"""A run of PPO that kills itself at a chosen moment: `python -m rl.killed_ppo DATA RUN POINT NUMBER [SETTING ...]` in `tests/`.

Points: `generate` (a sample has been written down), `judge` (an answer is asked for), `train` (an optimizer step ends),
`save` (the critic's checkpoint is complete, the policy's not begun). The process dies at number NUMBER of it.
"""

import os
import signal
import sys
from unittest import mock

from rl.toy_ppo import EXACT, run, scoring_judge


class Counter:
    """Kills the process at a count."""

    def __init__(self, number: int):
        self.left = number

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def after(method, count):
    """The method, with a count after each call."""

    def counted(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        count()
        return result

    return counted


def main(data: str, run_dir: str, point: str, number: int, extra: tuple[str, ...]) -> None:
    from step_megatron.checkpoint.saving import Checkpoints
    from step_megatron.rl.journal import Journal
    from step_megatron.rl.learning import Learner

    count = Counter(number)
    judge = scoring_judge
    if point == "judge":

        def judge(config):
            asked = scoring_judge(config)
            asked.answer = lambda requests, answer=asked.answer: (count(), answer(requests))[1]
            return asked

    points = {"generate": (Journal, "write"), "train": (Learner, "step"), "save": (Checkpoints, "wait")}
    owner, name = points.get(point, (Counter, "never"))
    with mock.patch.object(owner, name, after(getattr(owner, name, None), count), create=True):
        run(0, 1, data=data, run_dir=run_dir, extra=(*EXACT, *extra), judge=judge)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), tuple(sys.argv[5:]))
