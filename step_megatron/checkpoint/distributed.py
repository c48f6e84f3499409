"""Save and load checkpoints in Megatron's `torch_dist` layout, which any other parallel layout can read.

    RUN/checkpoints/step_00000200/   one directory a checkpoint, complete or absent
    RUN/checkpoints/latest           the name of the newest complete one

A checkpoint is written into a temporary directory and renamed when every rank has finished, and only then does `latest` name it:
an interrupted save leaves the previous checkpoint in place. It holds the model, the optimizer (moments and step count), the
scheduler, the random state of each rank, the loader's position and the step.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from step_megatron.errors import UserError
from step_megatron.runtime import megatron_checkpoint, seeds

LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")
BACKEND = ("torch_dist", 1)
# How Megatron lays out the state: by parameter, not by rank, so that every parallel layout can read it. Each layer has a name of
# its own: stacked over layers, moments could not be saved when only some layers are trained.
LAYOUT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and why."""


def checkpoint_root(run_dir: str | Path) -> Path:
    """The directory of a run that holds its checkpoints."""
    return Path(run_dir) / "checkpoints"


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None when there is none yet.

    Raises:
        CheckpointError: `latest` names a directory that is gone.
    """
    root = checkpoint_root(run_dir)
    pointer = root / LATEST
    if not pointer.is_file():
        return None
    directory = root / pointer.read_text(encoding="utf-8").strip()
    if not directory.is_dir():
        raise CheckpointError(
            f"{pointer}: names {directory.name}, which does not exist; write another step's directory name into it"
        )
    return directory


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    extra: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write one checkpoint; every rank calls this, with the same `step` and `extra`.

    Args:
        model: this rank's chunks, wrapped for data parallelism or not.
        extra: what else the run needs to go on (loader position and the like), plain values, equal on all ranks.
        keep: how many of the newest checkpoints stay, this one included; 0 keeps them all.

    Returns:
        The checkpoint's directory.
    """
    root = checkpoint_root(run_dir)
    final, temporary = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    weights = model_state(model, LAYOUT)
    state = {
        **weights,
        "optimizer": _optimizer_state(optimizer, weights, LAYOUT, is_loading=False),
        "updates": megatron_checkpoint.updates(optimizer),
        "scheduler": scheduler.state_dict(),
        "random": _random_shard(seeds.rng_state()),
        "ranks": torch.distributed.get_world_size(),
        "step": step,
        "extra": extra,
    }
    megatron_checkpoint.write_in_process()
    dist_checkpointing.save(state, str(temporary), BACKEND, content_metadata=LAYOUT)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _point_to(root, final.name)
        _remove_older(root, step, keep)
    torch.distributed.barrier()
    return final


def load_checkpoint(
    directory: str | Path, model: list[torch.nn.Module], optimizer: Any, scheduler: Any
) -> tuple[int, dict[str, Any]]:
    """Restore a run from a checkpoint, in this or another parallel layout; every rank calls this.

    Random state is restored when the number of ranks is the one that saved it; with another number it stays as the run's seed has
    set it (with no dropout nothing depends on it).

    Returns:
        The step that the checkpoint holds, and `extra` as it was saved.
    """
    layout = layout_of(directory)
    weights = model_state(model, layout)
    state = {**weights, "optimizer": _optimizer_state(optimizer, weights, layout, is_loading=True)}
    if "ranks" not in (common := _common(directory)):
        raise CheckpointError(
            f"{directory}: holds weights alone, so no run can go on from it; start a new one from it with model.weights, in a "
            "run.dir of its own"
        )
    same_ranks = common["ranks"] == torch.distributed.get_world_size()
    if same_ranks:
        state["random"] = _random_shard(None)
    loaded = load_state(state, directory)
    _load_weights(model, loaded)
    megatron_checkpoint.load_optimizer_state(optimizer, loaded["optimizer"], loaded["updates"])
    scheduler.load_state_dict(loaded["scheduler"])
    if same_ranks:
        seeds.load_rng_state(loaded["random"])
    return loaded["step"], loaded["extra"]


def load_model_weights(model: torch.nn.Module | list[torch.nn.Module], directory: str | Path) -> None:
    """Load the weights alone, into any tensor- and pipeline-parallel layout (one process included); every rank calls this.

    Raises:
        CheckpointError: no complete checkpoint there, or one of another shape of model.
    """
    chunks = model if isinstance(model, list) else [model]
    _load_weights(chunks, load_state(model_state(chunks, layout_of(directory)), directory))


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
    megatron_checkpoint.prepare_state(optimizer)
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_metadata(layout))


def _metadata(layout: dict[str, Any]) -> dict[str, Any]:
    return layout | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def layout_of(directory: str | Path) -> dict[str, Any]:
    """How a checkpoint was laid out, as it says itself; the layers are stacked where it says nothing."""
    said = dist_checkpointing.load_content_metadata(preloaded_state_dict=_common(directory))
    return said or LAYOUT | {"non_homogeneous_layers": False}


def _names(model: list[torch.nn.Module]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def _load_weights(model: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_names(model), model, strict=True):
        unwrap(chunk).load_state_dict(loaded[name])


def _common(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    if not (Path(directory) / "metadata.json").is_file():
        raise CheckpointError(f"{directory}: no complete checkpoint here (metadata.json is missing)")
    return dist_checkpointing.load_common_state_dict(str(directory))


def load_state(state: dict[str, Any], directory: str | Path, **options: Any) -> dict[str, Any]:
    """What a sharded state describes, from a checkpoint; `options` as of Megatron's `load`.

    Raises:
        CheckpointError: no complete checkpoint there, or one that does not hold just that.
    """
    _common(directory)
    try:
        return dist_checkpointing.load(state, str(directory), **options)
    except (CheckpointingException, CheckpointException, RuntimeError, KeyError, ValueError) as error:
        # Errors of other ranks arrive as the text of their tracebacks: the last line says what is wrong.
        raise CheckpointError(f"{directory}: does not fit this model: {str(error).strip().splitlines()[-1]}") from error


def _random_shard(states: dict[str, Any] | None) -> ShardedObject:
    """The random state of this rank, saved under its rank: every rank has its own."""
    return ShardedObject("random", states, (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),))


def _point_to(root: Path, name: str) -> None:
    temporary = root / f".{LATEST}"
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, root / LATEST)


def _remove_older(root: Path, step: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to `step`; later ones (of a run that went back) and copies that a user made
    beside them are left alone.
    """
    if not keep:
        return
    steps = sorted(int(found[1]) for path in root.iterdir() if (found := _STEP.fullmatch(path.name)) and int(found[1]) <= step)
    for older in steps[:-keep]:
        shutil.rmtree(root / f"step_{older:08d}", ignore_errors=True)
