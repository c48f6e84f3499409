"""Samples of many prompts, shared out over the ranks and written down as they end."""

import dataclasses
from collections.abc import Callable, Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from step_megatron.generation.data_parallel import share_out
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.rl.journal import Journal


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sequence[Sampling]],
    keys: Sequence[Sequence[str]],
    journal: Journal,
    beat: Callable[[], None] = lambda: None,
    ended: Callable[[str, Generation], None] = lambda key, generation: None,
) -> list[list[Generation]]:
    """Generate every sample that the journal does not know; every rank calls this with the same arguments.

    Args:
        samplings: of every sample of every prompt, seeds included: who generates it does not matter.
        keys: the samples' names in the journal.
        beat: called at every step of the engine.
        ended: called with each sample that this rank has generated, as it ends.

    Returns:
        All samples of every prompt, the same on every rank.
    """
    missing = [[i for i, key in enumerate(each) if key not in journal.known] for each in keys]
    todo = [number for number, samples in enumerate(missing) if samples]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shares = share_out([len(prompts[number].tokens) * len(missing[number]) for number in todo], group.size())
    waiting = []
    for place in shares[group.rank()]:
        number = todo[place]
        added = engine.add(prompts[number], [samplings[number][i] for i in missing[number]], f"prompt {number}")
        waiting += [(keys[number][i], member) for i, member in zip(missing[number], added.members, strict=True)]
    made: dict[str, dict] = {}
    with engine.running():
        while not engine.scheduler.idle:
            beat()
            if engine.step():
                for key, member in waiting:
                    if member.done:
                        made[key] = dataclasses.asdict(member.result)
                        journal.write(key, made[key])
                        ended(key, member.result)
                waiting = [(key, member) for key, member in waiting if not member.done]
    gathered: list[dict] = [{}] * group.size()
    dist.all_gather_object(gathered, made, group=group)
    for part in gathered:
        journal.known |= part
    return [[Generation(**journal.known[key]) for key in each] for each in keys]
