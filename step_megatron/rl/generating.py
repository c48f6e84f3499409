"""Samples of many prompts, shared out over the ranks and written down as they end."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import torch.distributed as dist
from megatron.core import parallel_state

from step_megatron.generation.data_parallel import share_out
from step_megatron.generation.interface import RolloutEngine, Sample
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.rl.journal import Journal


def entry(key: str, prompt: Prompt, sampling: Sampling) -> str:
    """The name of a sample in a journal: its key, and a digest of what it is made from.

    A run that goes on with another temperature or another template finds nothing that was made with the one before.
    """
    made_from = repr((list(prompt.tokens), list(prompt.encoder_frames), sampling)).encode()
    return f"{key}:{hashlib.sha256(made_from).hexdigest()[:16]}"


class Stream:
    """Samples on their way through an engine; each is written down as it ends.

    Args:
        engine: inside `engine.running()` where `step` is called.
        journal: knows what was generated before, and takes what ends now.
        ended: called with each sample that this rank has generated, as it ends.
    """

    def __init__(
        self, engine: RolloutEngine, journal: Journal, ended: Callable[[str, Generation], None] = lambda key, generation: None
    ):
        self._engine, self._journal, self._ended = engine, journal, ended
        self._waiting: list[tuple[str, str, Sample]] = []
        self._made: dict[str, dict] = {}

    def add(self, prompt: Prompt, samplings: Sequence[Sampling], keys: Sequence[str], name: str) -> None:
        """Queue a prompt with a sample for each sampling; `name` is what an error calls it."""
        added = self._engine.add(prompt, samplings, name)
        entries = [entry(key, prompt, sampling) for key, sampling in zip(keys, samplings, strict=True)]
        self._waiting += zip(keys, entries, added.members, strict=True)

    @property
    def idle(self) -> bool:
        return not self._waiting

    def step(self) -> None:
        """One step of the engine, if there is anything to do."""
        if self._waiting and self._engine.step():
            for key, name, member in self._waiting:
                if member.done:
                    self._made[name] = dataclasses.asdict(member.result)
                    self._journal.write(name, self._made[name])
                    self._ended(key, member.result)
            self._waiting = [waiting for waiting in self._waiting if not waiting[-1].done]

    def share(self) -> None:
        """Let the journals of all ranks know what each has made; every rank calls this."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        gathered: list[dict] = [{}] * group.size()
        dist.all_gather_object(gathered, self._made, group=group)
        for part in gathered:
            self._journal.known |= part
        self._made = {}


def generate(
    engine: RolloutEngine,
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
        keys: the samples' names; in the journal `entry` makes one of each.
        beat: called at every step of the engine.
        ended: as of `Stream`.

    Returns:
        All samples of every prompt, the same on every rank.
    """
    entries = [
        [entry(key, prompt, sampling) for key, sampling in zip(each, drawn, strict=True)]
        for prompt, each, drawn in zip(prompts, keys, samplings, strict=True)
    ]
    missing = [[i for i, name in enumerate(each) if name not in journal.known] for each in entries]
    todo = [number for number, samples in enumerate(missing) if samples]
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    shares = share_out([len(prompts[number].tokens) * len(missing[number]) for number in todo], group.size())
    stream = Stream(engine, journal, ended)
    for number in (todo[place] for place in shares[group.rank()]):
        mine = missing[number]
        stream.add(prompts[number], [samplings[number][i] for i in mine], [keys[number][i] for i in mine], f"prompt {number}")
    with engine.running():
        while not stream.idle:
            beat()
            stream.step()
    stream.share()
    return [[Generation(**journal.known[name]) for name in each] for each in entries]
