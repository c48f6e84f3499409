"""Freezing by name pattern, checked against the whole model: a pattern that matches nothing anywhere is an error."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

from step_megatron.model import weights


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
        Full names of the frozen parameters on this rank, sorted.

    Raises:
        ValueError: a pattern that matches no parameter on any rank (raised on every rank; lists the nearest names), or patterns
            that leave nothing to train.
    """
    mine: dict[str, torch.nn.Parameter] = {}
    for chunk in model_chunks:
        names = weights.full_names(chunk)
        mine.update({names[local]: parameter for local, parameter in chunk.named_parameters()})
    everyone = sorted(mine)
    if group is not None and dist.get_world_size(group) > 1:
        gathered: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, everyone, group=group)
        everyone = sorted(set().union(*gathered))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in everyone):
            raise ValueError(f"model.freeze: {pattern!r} matches no parameter; nearest: {', '.join(_nearest(pattern, everyone))}")
    if patterns and all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in everyone):
        raise ValueError(f"model.freeze: {', '.join(patterns)} match every parameter, so there is nothing to train")
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
