"""Repairs of Megatron-Core 0.16.1's distributed optimizer that saving and loading its state needs.

With torch's AdamW (no Transformer Engine, no apex) the distributed optimizer of this release cannot save before its first step,
and cannot load: it looks for a `step` tensor among the saved moments, where it has not put one.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that Megatron chains; those without parameters (a frozen stage) are left out."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if part.optimizer is not None]


def prepare_state(optimizer: Any) -> None:
    """Give an optimizer of torch's that has not stepped the (zero) state that saving and loading expect of it."""
    for part in optimizer_parts(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter].update(_empty_state(part.optimizer, group, parameter))
        part.init_state_fn = part.init_state_fn or _nothing


def updates(optimizer: Any) -> int:
    """Steps that torch's Adam has made, over all ranks: a frozen stage has made none, and rank 0 may be one."""
    states = [state for part in optimizer_parts(optimizer) for state in part.optimizer.state.values()]
    mine = max((int(state["step"]) for state in states if isinstance(state.get("step"), torch.Tensor)), default=0)
    everyone = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return max(everyone)


@torch.no_grad()
def load_optimizer_state(optimizer: Any, loaded: dict[str, Any], updates: int) -> None:
    """Load what `sharded_state_dict` described; afterwards every parameter has a `step` of its own.

    Megatron saves the step count of rank 0, if it is not 0, and loads it as one tensor for all parameters (distributed
    optimizer), which torch's AdamW then advances once per parameter. The settings of the groups (learning rates, decay, betas)
    stay this run's: a checkpoint has those of the run that saved it, and would silently undo a change.

    Args:
        updates: what `updates` gave when the state was saved.
    """
    if _is_torch_adam(optimizer) and "state" in (plain := loaded.get("optimizer", loaded)):
        plain["state"]["common_step"] = torch.tensor(float(updates))
    parts = optimizer_parts(optimizer)
    settings = [[_settings(group) for group in part.optimizer.param_groups] for part in parts]
    for part in parts:
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = _keeping_step(part)
    optimizer.load_state_dict(loaded)
    for part, groups in zip(parts, settings, strict=True):
        for group, own in zip(part.optimizer.param_groups, groups, strict=True):
            group.update(own)
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a run configures of a parameter group; apex's and Transformer Engine's Adam keep their step count there too."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}


def _keeping_step(part: DistributedOptimizer):
    """`_set_main_param_and_optimizer_states` that leaves `step` as it is: it is loaded with the parameter groups."""
    load = DistributedOptimizer._set_main_param_and_optimizer_states

    def load_moments(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        load(part, model_param, tensors | ({"step": state["step"]} if "step" in state else {}))

    return load_moments


def _is_torch_adam(optimizer: Any) -> bool:
    return any(isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW) for part in optimizer_parts(optimizer))


def _empty_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return {"step": torch.tensor(0.0), **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}}
    if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {}


def _nothing(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Megatron has no function that makes SGD's state."""
