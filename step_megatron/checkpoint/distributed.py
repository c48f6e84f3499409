"""What is in a checkpoint, and loading it: Megatron's `torch_dist` layout, which any other parallel layout can read.

A checkpoint holds the model, the optimizer (moments and step count), the scheduler, the random state of each rank, the loader's
position and the step. Its folder is the matter of `checkpoint.directory`, writing it of `checkpoint.saving`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from step_megatron.checkpoint import seal
from step_megatron.checkpoint.directory import CheckpointError
from step_megatron.runtime import megatron_optimizer, megatron_reading, seeds
from step_megatron.runtime.agreement import Ranks
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)
# How Megatron lays out the state: by parameter, not by rank, so that every parallel layout can read it. Each layer has a name of
# its own: stacked over layers, moments could not be saved when only some layers are trained.
LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def training_state(
    step: int, model: list[torch.nn.Module], optimizer: Any, scheduler: Any, extra: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a run needs to go on from `step`, as Megatron's sharded state; arguments as `Checkpoints.save`."""
    weights = model_state(model, LAYOUT)
    return {
        **weights,
        "optimizer": _optimizer_state(optimizer, weights, LAYOUT, is_loading=False),
        "updates": megatron_optimizer.updates(optimizer),
        "scheduler": scheduler.state_dict(),
        "random": _random_shard(seeds.rng_state()),
        "ranks": torch.distributed.get_world_size(),
        "step": step,
        "extra": extra,
    }


def load_checkpoint(
    directory: str | Path, model: list[torch.nn.Module], optimizer: Any, scheduler: Any, verified: bool = False
) -> tuple[int, dict[str, Any]]:
    """Restore a run from a checkpoint, in this or another parallel layout; every rank calls this.

    Random state is restored when the number of ranks is the one that saved it; with another number it stays as the run's seed has
    set it (with no dropout nothing depends on it).

    Args:
        verified: its files were held against their sums just now (`recovery.newest_good`).

    Returns:
        The step that the checkpoint holds, and `extra` as it was saved.

    Raises:
        CheckpointError: damaged, of another model, or without a training state; on every rank.
    """
    if not verified:
        check_whole(directory)
    layout = layout_of(directory)
    weights = model_state(model, layout)
    state = {**weights, "optimizer": _optimizer_state(optimizer, weights, layout, is_loading=True)}
    if "ranks" not in (common := _common(directory)):
        raise CheckpointError(
            f"{directory}: holds weights alone, so no run can go on from it; start a new one from it with model.weights, in a "
            "run.dir of its own"
        )
    check_layers(directory, model[0])
    same_ranks = common["ranks"] == torch.distributed.get_world_size()
    if same_ranks:
        state["random"] = _random_shard(None)
    loaded = load_state(state, directory)
    _load_weights(model, loaded)
    megatron_optimizer.load_optimizer_state(optimizer, loaded["optimizer"], loaded["updates"])
    scheduler.load_state_dict(loaded["scheduler"])
    if same_ranks:
        seeds.load_rng_state(loaded["random"])
    else:
        logger.info("%s was saved by %d ranks: random states are those of run.seed", directory, common["ranks"])
    return loaded["step"], loaded["extra"]


def saved_names(directory: str | Path) -> list[str]:
    """Names of what a checkpoint holds; the model's parameters are among them under names that end as their full names do."""
    return list(megatron_reading.IndexReader(directory).read_metadata().state_dict_metadata)


def load_model_weights(
    model: torch.nn.Module | list[torch.nn.Module], directory: str | Path, without: Callable[[str], bool] | None = None
) -> None:
    """Load the weights alone, into any tensor- and pipeline-parallel layout (one process included); every rank calls this.

    Args:
        without: parameters, by name, that are not loaded and keep their values.

    Raises:
        CheckpointError: no complete checkpoint there, a damaged one, or one of another shape of model.
    """
    check_whole(directory)
    chunks = model if isinstance(model, list) else [model]
    check_layers(directory, chunks[0])
    state = model_state(chunks, layout_of(directory))
    if without is not None:
        state = {part: {name: item for name, item in tensors.items() if not without(name)} for part, tensors in state.items()}
    _load_weights(chunks, load_state(state, directory), strict=without is None)


def check_whole(directory: str | Path) -> None:
    """Hold the files of a checkpoint against the sums that they were written with; every rank calls this.

    Raises:
        CheckpointError: names every file that is damaged, missing or of another length; on every rank.
    """
    if problems := seal.verify(Path(directory), Ranks()):
        raise CheckpointError(damage(directory, problems))


def check_layers(directory: str | Path, model: torch.nn.Module) -> None:
    """Refuse a checkpoint of another depth: Megatron's `load` reads what it is asked for, and would leave the other layers out.

    Args:
        model: any chunk of the model.

    Raises:
        CheckpointError: says both numbers of layers.
    """
    saved = {int(number) for name in saved_names(directory) for number in _LAYER.findall(name)}
    wanted = unwrap(model).config.num_layers
    # Stacked layers (older checkpoints) have no numbers: there the shapes tell.
    if saved and len(saved) != wanted:
        raise CheckpointError(
            f"{directory}: holds {len(saved)} layers, the model has {wanted}; take megatron.transformer.num_layers from the "
            "config.yaml of its run"
        )


def damage(directory: str | Path, problems: list[str]) -> str:
    """What is wrong with a checkpoint, and the remedy."""
    return f"{directory} is not whole: {'; '.join(problems)}. Use another checkpoint, or copy this one here again"


def model_state(model: list[torch.nn.Module], layout: dict[str, Any]) -> dict[str, Any]:
    """Sharded state of this rank's chunks, under `model` or, with virtual pipeline stages, `model0`, `model1`, ..."""
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=_metadata(layout))
        for name, chunk in zip(_names(model), model, strict=True)
    }


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The audio language model inside Megatron's data-parallel and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module


def _optimizer_state(optimizer: Any, weights: dict[str, Any], layout: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Sharded state of the optimizer; the moments take their sharding from the weights, so they move between layouts."""
    megatron_optimizer.prepare_state(optimizer)
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_metadata(layout))


def _metadata(layout: dict[str, Any]) -> dict[str, Any]:
    return layout | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def layout_of(directory: str | Path) -> dict[str, Any]:
    """How a checkpoint was laid out, as it says itself; the layers are stacked where it says nothing."""
    said = dist_checkpointing.load_content_metadata(preloaded_state_dict=_common(directory))
    return said or LAYOUT | {"non_homogeneous_layers": False}


def _names(model: list[torch.nn.Module]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def _load_weights(model: list[torch.nn.Module], loaded: dict[str, Any], strict: bool = True) -> None:
    for name, chunk in zip(_names(model), model, strict=True):
        unwrap(chunk).load_state_dict(loaded[name], strict=strict)


def _common(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    return megatron_reading.load_common(Path(directory))


def load_state(state: dict[str, Any], directory: str | Path, **options: Any) -> dict[str, Any]:
    """What a sharded state describes, from a checkpoint; `options` as of Megatron's `load`.

    Raises:
        CheckpointError: it does not hold just that.
        UnsafeCheckpoint: it holds what no checkpoint needs.
    """
    try:
        return megatron_reading.load(state, Path(directory), **options)
    except megatron_reading.UnsafeCheckpoint:
        raise
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError, ValueError) as error:
        # Errors of other ranks arrive as the text of their tracebacks: the last line says what is wrong, then all that there is.
        said = str(error).strip().splitlines()[-1].split(" not in state dict:")[0][:400]
        raise CheckpointError(
            f"{directory}: does not fit this model: {said}; the model has to be the one that config.yaml of its run describes"
        ) from error


def _random_shard(states: dict[str, Any] | None) -> ShardedObject:
    """The random state of this rank, saved under its rank: every rank has its own."""
    return ShardedObject("random", states, (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),))
