"""Learning-rate schedules equal their closed forms at every step; weight decay reaches matrices only."""

import math

import pytest
import torch

from step_megatron.config import ConfigError
from step_megatron.config.schema import TrainingConfig

PEAK, FLOOR = 3e-3, 2e-4


class Groups:
    """What the scheduler needs of an optimizer: parameter groups."""

    def __init__(self):
        self.param_groups = [
            {"params": [], "default_config": True, "wd_mult": 1.0, "max_lr": PEAK, "min_lr": FLOOR},
            {"params": [], "default_config": True, "wd_mult": 0.0, "max_lr": PEAK, "min_lr": FLOOR},
        ]


def closed_form(kind: str, step: int, steps: int, warmup: int, decay: int) -> float:
    if step <= warmup:
        return PEAK * step / warmup
    progress = (step - warmup) / (steps - warmup)
    if kind == "cosine":
        return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
    if kind == "linear":
        return FLOOR + (PEAK - FLOOR) * (1 - progress)
    if kind == "wsd":
        return FLOOR + (PEAK - FLOOR) * min(1.0, (steps - step) / decay)
    return PEAK


def scheduler(**training):
    from megatron.core.optimizer import OptimizerConfig

    from step_megatron.training.schedule import build_scheduler

    optimizer = Groups()
    settings = OptimizerConfig(optimizer="adam", lr=PEAK, min_lr=FLOOR, weight_decay=0.1)
    return optimizer, build_scheduler(TrainingConfig(**training), settings, optimizer)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_every_step_follows_the_closed_form(kind, warmup):
    optimizer, schedule = scheduler(steps=40, lr_warmup_steps=warmup, lr_schedule=kind, wsd_decay_steps=10)
    for step in range(1, 41):
        schedule.step(1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(closed_form(kind, step, 40, warmup, 10), rel=1e-12), step


def test_weight_decay_is_applied_by_the_scheduler_and_spares_norms_and_biases():
    optimizer, schedule = scheduler(steps=10)
    schedule.step(1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("training", "key"),
    [
        ({"steps": 0}, "training.steps"),
        ({"steps": 10, "lr_warmup_steps": 10}, "training.lr_warmup_steps"),
        ({"steps": 10, "lr_schedule": "wsd"}, "training.wsd_decay_steps"),
        ({"steps": 10, "lr_warmup_steps": 4, "lr_schedule": "wsd", "wsd_decay_steps": 7}, "training.wsd_decay_steps"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_named(training, key):
    with pytest.raises(ConfigError, match=key):
        scheduler(**training)


def test_an_unknown_optimizer_field_names_the_nearest():
    from megatron.core.optimizer import OptimizerConfig

    from step_megatron.config.passthrough import build_section

    with pytest.raises(ConfigError, match=r"megatron.optimizer.weight_decy.*did you mean megatron.optimizer.weight_decay"):
        build_section(OptimizerConfig, {"weight_decy": 0.1}, "megatron.optimizer")


def test_a_field_that_contradicts_the_run_is_refused():
    from megatron.core.optimizer import OptimizerConfig

    from step_megatron.config.passthrough import build_section

    with pytest.raises(ConfigError, match=r"megatron.optimizer.params_dtype"):
        build_section(OptimizerConfig, {"params_dtype": "float32"}, "megatron.optimizer", params_dtype=torch.bfloat16)
