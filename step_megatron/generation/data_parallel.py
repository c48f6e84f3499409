"""Prompts shared out over data-parallel ranks: each generates some of them, and all get all results."""

from collections.abc import Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from step_megatron.generation.engine import Engine
from step_megatron.generation.interface import sample_seeds
from step_megatron.generation.request import Generation, Prompt, Sampling


def generate(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, samples: int = 1) -> list[Generation]:
    """`Engine.generate` over all ranks, which call it with the same arguments; the result is that of one rank.

    Context-parallel ranks count as data-parallel ones: a decoding step has nothing for them to cut.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shares = share_out([len(prompt.tokens) for prompt in prompts], group.size())
    mine = shares[group.rank()]
    samplings = sample_seeds(sampling, mine, samples)
    generated = engine.generate([prompts[index] for index in mine], samplings, samples)
    gathered: list[list[Generation]] = [[] for _ in shares]
    dist.all_gather_object(gathered, generated, group=group)
    results: list[Generation] = [Generation()] * (len(prompts) * samples)
    for share, part in zip(shares, gathered, strict=True):
        for place, index in enumerate(share):
            results[index * samples : (index + 1) * samples] = part[place * samples : (place + 1) * samples]
    return results


def share_out(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices for each rank: longest first, each to the rank that has least; how long replies get nobody knows."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(share) for share in shares]
