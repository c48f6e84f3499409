"""What an engine offers: `Engine`, on the trainer's own weights, and `vllm_backend.VLLMEngine`, on a copy of them."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.runtime import seeds


class Sample(Protocol):
    """One sample on its way."""

    done: bool
    result: Generation


class Group(Protocol):
    """The samples of one prompt."""

    members: Sequence[Sample]


class RolloutEngine(ABC):
    """Prompts in, samples out. Tensor-parallel ranks call it with the same arguments.

    Attributes:
        weight_version: of the weights that it generates with; every sample carries it.
    """

    weight_version = 0

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing is left to do."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory that the cache holds now."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        samples: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Generate `samples` samples of every prompt.

        Args:
            prompts: any number.
            sampling: one for all, whose seed then gives every sample a seed of its own by the indices of prompt and sample; or
                one for every sample, taken as it is.
            samples: of each prompt; they share its computation and its pages.
            progress: called with the number of samples that have ended since the last call.

        Returns:
            All samples of the first prompt, then of the second, and so on.

        Raises:
            ValueError: see `add`; then nothing is queued.
        """
        if isinstance(sampling, Sampling):
            sampling = sample_seeds(sampling, range(len(prompts)), samples)
        if len(sampling) != len(prompts) * samples:
            raise ValueError(f"{len(sampling)} samplings for {len(prompts)} prompts with {samples} samples each")
        parts = [list(sampling[i * samples : (i + 1) * samples]) for i in range(len(prompts))]
        for index, each in enumerate(zip(prompts, parts, strict=True)):
            self._check(*each, f"prompt {index}")
        groups = [self._queue(*each) for each in zip(prompts, parts, strict=True)]
        with self.running():
            while not self.idle:
                ended = self.step()
                if progress and ended:
                    progress(ended)
        return [member.result for group in groups for member in group.members]

    def add(self, prompt: Prompt, samplings: Sequence[Sampling], name: str = "the prompt") -> Group:
        """Queue a prompt with one sample for each sampling; `step` moves it on, and the results fill as it does.

        Raises:
            ValueError: names the prompt and why it cannot be continued so.
        """
        self._check(prompt, samplings, name)
        return self._queue(prompt, samplings)

    @abstractmethod
    def cancel(self, group: Group) -> None:
        """End the samples of a prompt that have not ended."""

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """Where `step` may be called."""

    @abstractmethod
    def step(self) -> int:
        """Move the samples on; the number of those that ended."""

    def weights_changed(self) -> None:
        """The model has new weights: samples from now on carry a new version.

        Raises:
            RuntimeError: samples are on their way; what is kept of them was computed by the old weights.
        """
        self._refuse_if_busy("the weights changed while samples were being generated")
        self.weight_version += 1

    @abstractmethod
    def release_cache(self) -> None:
        """Give the cache's memory back; the next sample allocates it again.

        Raises:
            RuntimeError: samples are on their way.
        """

    def _refuse_if_busy(self, problem: str) -> None:
        if not self.idle:
            raise RuntimeError(f"{problem}: let the samples end, or cancel them, before")

    @abstractmethod
    def _check(self, prompt: Prompt, samplings: Sequence[Sampling], name: str) -> None:
        """Raise what `add` raises."""

    @abstractmethod
    def _queue(self, prompt: Prompt, samplings: Sequence[Sampling]) -> Group:
        """`add`, checked."""


def sample_seeds(sampling: Sampling, prompts: Sequence[int], samples: int) -> list[Sampling]:
    """The sampling of every sample, prompts first: a seed of its own from that of `sampling`, the prompt's index and its own."""
    indices = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    return [dataclasses.replace(sampling, seed=seeds.derive(sampling.seed, *each)) for each in indices]
