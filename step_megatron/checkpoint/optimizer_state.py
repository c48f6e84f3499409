"""The optimizer's part of a checkpoint, in a form that any parallel layout can load.

Megatron saves the moments beside the parameters that they belong to, so the plain optimizer's state moves between layouts by itself.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def optimizer_state(optimizer: Any, weights: dict[str, Any], is_loading: bool) -> dict[str, Any]:
    """Sharded state of the optimizer.

    Args:
        weights: `distributed.model_state` of the same chunks; the moments take their sharding from it.
        is_loading: make empty moments to be filled, where there are none yet.
    """
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            raise NotImplementedError("checkpoints of the distributed optimizer")
    return optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata())


def metadata() -> dict[str, Any]:
    """How Megatron is to lay out the state: by parameter, not by rank."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


@torch.no_grad()
def restore_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Put loaded state into the optimizer.

    Megatron gives every parameter the same `step` tensor, which torch's AdamW then advances once per parameter: each gets its own.
    """
    optimizer.load_state_dict(loaded)
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chains; a rank whose stage is frozen has one without parameters."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]
