"""Freezing by name pattern, checked against the whole model: a pattern that matches nothing anywhere is an error."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

from step_megatron.model import weights
from step_megatron.model.lora import is_adapter


def freeze(
    model_chunks: Sequence[torch.nn.Module], patterns: Sequence[str], group: dist.ProcessGroup | None = None
) -> tuple[str, ...]:
    """Stop training the parameters whose full names match; collective over `group`.

    Args:
        model_chunks: this rank's `AudioLanguageModel` chunks, before they are wrapped (wrappers allot gradient buffers).
        patterns: `fnmatch` patterns on full names, such as `language_model.*` or `*.decoder.layers.[0-3].*`; layers are numbered
            over the whole model, from 0.
        group: ranks that hold the whole model between them (`Runtime.control_group`); None if this rank holds it.

    Returns:
        Full names of the parameters on this rank that match, sorted.

    Raises:
        ValueError: a pattern that matches no parameter on any rank (raised on every rank; lists the nearest names), patterns that
            leave nothing to train or, of a model with LoRA, no adapter.
    """
    mine: dict[str, torch.nn.Parameter] = {}
    for chunk in model_chunks:
        names = weights.full_names(chunk)
        mine.update({names[local]: parameter for local, parameter in chunk.named_parameters()})
    trained = {name: parameter.requires_grad for name, parameter in mine.items()}
    if group is not None and dist.get_world_size(group) > 1:
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, trained, group=group)
        trained = dict(item for part in gathered for item in part.items())
    everyone = sorted(trained)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everyone):
            raise ValueError(f"model.freeze: {pattern!r} matches no parameter; nearest: {', '.join(_nearest(pattern, everyone))}")
    left = [name for name in everyone if trained[name] and not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if patterns and not left:
        raise ValueError(f"model.freeze: {', '.join(patterns)} match every parameter, so there is nothing to train")
    if any(map(is_adapter, everyone)) and not any(map(is_adapter, left)):
        raise ValueError(
            f"model.freeze: {', '.join(patterns)} match every adapter that model.lora asks for; the layers under them are frozen "
            "anyway: leave them out of model.freeze, or set model.lora.rank=0"
        )
    frozen = sorted(name for name in mine if any(fnmatchcase(name, pattern) for pattern in patterns))
    for name in frozen:
        mine[name].requires_grad_(False)
    return tuple(frozen)


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names like the pattern, one of each kind: layers differ only in their number."""
    plain = pattern.strip("*")
    kinds = {weights.without_layer_number(name): name for name in reversed(names)}
    found = difflib.get_close_matches(weights.without_layer_number(plain), list(kinds), n=3, cutoff=0.0)
    return [kinds[kind] for kind in found]
