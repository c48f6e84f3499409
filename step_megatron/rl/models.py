"""The models of a PPO run, built from its configuration: actor, critic, reference, judge; and what of them sleeps when."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.checkpoint.directory import latest_checkpoint
from step_megatron.checkpoint.distributed import load_model_weights, unwrap
from step_megatron.config.load import LAYOUT_FIELDS, RUN_CONFIG, ConfigError, load_config
from step_megatron.config.schema import Config
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.generation.engine import Engine
from step_megatron.generation.interface import RolloutEngine
from step_megatron.generation.rendering import Rendering
from step_megatron.model.audio_lm import build_model
from step_megatron.rl.colocation import Cache, Resident, Sleeper
from step_megatron.rl.judge.phase import ColocatedJudging
from step_megatron.rl.learning import Learner
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.megatron_optimizer import optimizer_parts
from step_megatron.training.state import TrainState, build_state, load_start

# Residents that each phase needs on the device.
NEEDS = {
    "encode": ("encoder",),
    "generate": ("actor.weights", "actor.cache"),
    "judge": ("judge.weights", "judge.cache"),
    "score": ("actor.weights", "critic.weights", "reference.weights"),
    "train": ("actor.weights", "actor.optimizer", "actor.gradients"),
    "train critic": ("critic.weights", "critic.optimizer", "critic.gradients"),
    "save": tuple(f"{name}.{part}" for name in ("actor", "critic") for part in ("weights", "optimizer")),
}


def build_actor(config: Config, runtime: Runtime, group: dist.ProcessGroup, resumes: bool) -> Learner:
    """The policy, with a second head where the critic shares its trunk."""
    shared = config.rl.ppo.baseline == "critic" and config.rl.critic.kind == "shared"
    state = build_state(config, runtime.control_group, resumes, head="both" if shared else "language")
    return Learner(state, runtime, group)


def build_critic(config: Config, runtime: Runtime, group: dist.ProcessGroup, resumes: bool) -> Learner | None:
    """The value network that begins as the policy; None where there is none of its own."""
    if config.rl.ppo.baseline != "critic" or config.rl.critic.kind != "separate":
        return None
    config = copy.deepcopy(config)
    for name in ("lr", "min_lr"):
        if name in config.megatron.optimizer:
            config.megatron.optimizer[name] *= config.rl.critic.lr_factor
    return Learner(build_state(config, runtime.control_group, resumes, head="value"), runtime, group)


def build_reference(config: Config) -> list[torch.nn.Module] | None:
    """The frozen policy that PPO starts from; None where that is the actor without its adapters."""
    if config.model.lora.rank and not _starts_adapted(config):
        return None
    chunks = build_model(config)
    if config.model.weights:
        load_start(chunks, config)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return chunks


def _starts_adapted(config: Config) -> bool:
    """Whether the run starts from a model whose adapters were trained already: without them it is not the reference."""
    return bool(config.model.weights) and bool(load_config(Path(config.model.weights) / RUN_CONFIG).model.lora.rank)


def build_judge(
    config: Config, runtime: Runtime, group: dist.ProcessGroup, index: Any, overlap: bool, beat: Callable[[], None]
) -> tuple[ColocatedJudging, torch.nn.Module]:
    """The reward model of `rl.judge.run`, in the layout of this run, and its module.

    Raises:
        ConfigError: no checkpoint there, or it hears through another encoder.
    """
    folder = Path(config.rl.judge.run)
    theirs = load_config(folder / RUN_CONFIG)
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"rl.judge.run={folder}: no checkpoint there; train it with `step-megatron train reward`")
    ours = dataclasses.asdict(config.encoder)
    if differing := [name for name, value in dataclasses.asdict(theirs.encoder).items() if value != ours[name]]:
        raise ConfigError(
            f"rl.judge.run={folder}: its encoder.{differing[0]} is not this run's; the judge hears what the policy's encoder "
            "hears: train it with the same encoder"
        )
    for name in LAYOUT_FIELDS:
        theirs.megatron.transformer.pop(name, None)
        if name in config.megatron.transformer:
            theirs.megatron.transformer[name] = config.megatron.transformer[name]
    (model,) = build_model(theirs)
    load_model_weights(model, checkpoint)
    model.requires_grad_(False).eval()
    rendering = Rendering(Tokenizer.load(theirs.tokenizer.path), theirs.tokenizer)
    judging = ColocatedJudging(
        Engine(model, config.generation),
        rendering,
        ClipLengths(index, theirs.adaptor),
        config.rl.judge,
        config.run.seed,
        group,
        writes=runtime.tp_rank == 0,
        overlap=overlap,
        beat=beat,
    )
    return judging, model


def residents_of(
    actor: Learner,
    critic: Learner | None,
    reference: list[torch.nn.Module] | None,
    engine: RolloutEngine,
    judge: tuple[ColocatedJudging, torch.nn.Module] | None,
    encoder: torch.nn.Module | None,
) -> dict[str, Sleeper]:
    """What may sleep, weights first."""
    modules = [*actor.model, *(critic.model if critic else []), *(reference or []), judge and judge[1], encoder]
    for parameter in (parameter for module in modules if module is not None for parameter in module.parameters()):
        if not parameter.untyped_storage().resizable():
            # Memory of a file, of numpy or of another process, which is not torch's to free.
            parameter.data = parameter.data.clone()
    residents: dict[str, Sleeper] = {}
    if encoder is not None:
        residents["encoder"] = Resident(partial(_weights, [encoder]))
    learners = {"actor": actor} | ({} if critic is None else {"critic": critic})
    for name, learner in learners.items():
        residents[f"{name}.weights"] = Resident(partial(_weights, learner.model))
    if reference is not None:
        residents["reference.weights"] = Resident(partial(_weights, reference))
    if judge is not None:
        residents["judge.weights"] = Resident(partial(_weights, [judge[1]]))
    for name, learner in learners.items():
        residents[f"{name}.optimizer"] = Resident(partial(_optimizer_state, learner.state))
        residents[f"{name}.gradients"] = Resident(partial(_gradients, learner.state), keeps=False)
    residents["actor.cache"] = Cache(engine)
    if judge is not None:
        residents["judge.cache"] = Cache(judge[0].engine)
    return residents


def _weights(modules: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    return (parameter.data for module in modules for parameter in unwrap(module).parameters())


def _gradients(state: TrainState) -> Iterator[torch.Tensor]:
    """Megatron's flat gradient buffers, of which every `main_grad` is a view."""
    return (buffer.grad_data for chunk in state.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers))


def _optimizer_state(state: TrainState) -> Iterator[torch.Tensor]:
    """Moments, and parameters in the optimizer's own precision; not the parameters that are the model's."""
    taken = {tensor.untyped_storage()._cdata for tensor in (*_weights(state.model), *_gradients(state))}
    for part in optimizer_parts(state.optimizer):
        tensors = [p.data for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [v for values in part.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        yield from (tensor for tensor in tensors if tensor.untyped_storage()._cdata not in taken)
