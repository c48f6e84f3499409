"""What an iteration has generated is used again by the same request only."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.rl.generating import generate
from step_megatron.rl.journal import Journal

PROMPT = Prompt([1, 2, 3])
SAMPLINGS = [Sampling(1.0, seed=seed, max_new_tokens=4) for seed in (5, 6)]


class Engine:
    """Ends every sample at once, with its seed as its token."""

    def __init__(self):
        self.asked: list[int] = []

    def add(self, prompt, samplings, name):
        self.asked += [sampling.seed for sampling in samplings]
        results = [Generation([sampling.seed], [-0.5], "stop", 0) for sampling in samplings]
        return SimpleNamespace(members=[SimpleNamespace(done=True, result=result) for result in results])

    def step(self):
        return True

    def running(self):
        return nullcontext()


def asked(folder, prompt=PROMPT, samplings=SAMPLINGS) -> list[int]:
    """Seeds of the samples that are generated in a folder where others may have been."""
    import torch.distributed as dist

    engine = Engine()
    with Journal(folder, "rollouts", dist.group.WORLD, True) as journal:
        (made,) = generate(engine, [prompt], [samplings], [["1.0.0", "1.0.1"]], journal)
    assert [generation.tokens for generation in made] == [[sampling.seed] for sampling in samplings]
    return engine.asked


def test_nothing_is_generated_twice(runtime, tmp_path):
    assert asked(tmp_path) == [5, 6]
    assert asked(tmp_path) == []


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_p": 0.9}, {"max_new_tokens": 8}])
def test_samples_of_other_settings_are_not_used(runtime, tmp_path, change):
    asked(tmp_path)
    assert asked(tmp_path, samplings=[dataclasses.replace(SAMPLINGS[0], **change), SAMPLINGS[1]]) == [5]


def test_samples_of_another_prompt_are_not_used(runtime, tmp_path):
    asked(tmp_path)
    assert asked(tmp_path, prompt=Prompt([1, 2, 4])) == [5, 6]
