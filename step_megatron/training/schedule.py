"""Learning rate and weight decay over the steps of a run: Megatron's scheduler, counted in optimizer steps.

Step s = 1..S uses, with W warmup steps, peak P = `megatron.optimizer.lr`, floor F = `megatron.optimizer.min_lr`:

    warmup    P s / W                                        for s <= W
    cosine    F + (P - F) (1 + cos(pi (s - W) / (S - W))) / 2
    linear    F + (P - F) (1 - (s - W) / (S - W))
    constant  P
    wsd       P, then over the last D steps F + (P - F) (S - s) / D

Weight decay goes through the same object: Megatron's parameter groups only carry a multiplier (0 for biases and norms), and the
scheduler is what applies it. An optimizer stepped without it would decay them.

On resume only the step comes from the checkpoint: the schedule is that of this run's settings, so a run may be made longer.
"""

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import TrainingConfig


def build_scheduler(
    training: TrainingConfig, optimizer_config: OptimizerConfig, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Make the scheduler of a run; call `.step(1)` before each optimizer step, so that step s uses the value for s.

    Raises:
        ConfigError: warmup or decay that does not fit into the run.
    """
    steps, warmup, decay = training.steps, training.lr_warmup_steps, training.wsd_decay_steps
    if steps < 1:
        raise ConfigError(f"training.steps={steps}: must be at least 1")
    if not 0 <= warmup < steps:
        raise ConfigError(f"training.lr_warmup_steps={warmup}: must be between 0 and training.steps-1={steps - 1}")
    if training.lr_schedule == "wsd" and not 0 < decay <= steps - warmup:
        raise ConfigError(f"training.wsd_decay_steps={decay}: must be between 1 and the {steps - warmup} steps after warmup")
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optimizer_config.lr,
        min_lr=optimizer_config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style="WSD" if training.lr_schedule == "wsd" else training.lr_schedule,
        start_wd=optimizer_config.weight_decay,
        end_wd=optimizer_config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=decay,
        lr_wsd_decay_style="linear",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the parameter groups that follow the schedule unchanged."""
    return next(group["lr"] for group in optimizer.param_groups if group["default_config"])
