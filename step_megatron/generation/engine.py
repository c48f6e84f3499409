"""The engine: prompts in, samples out, with the weights of the model that trains.

    engine = Engine(model, config.generation)
    generations = engine.generate(prompts, Sampling(temperature=1.0, max_new_tokens=512), samples=16)

A step starts what there is room for, reads one pass of prompt chunks, and decodes one token of every running sample.
Tensor-parallel ranks call it with the same arguments and come to the same decisions, for they see the same logits. Data-parallel
ranks share prompts out (`data_parallel.generate`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from step_megatron.config.schema import GenerationConfig
from step_megatron.generation.cache import KeyValueCache
from step_megatron.generation.decode import Decoder
from step_megatron.generation.forward import Forward
from step_megatron.generation.layout import check_layout, generation_mode
from step_megatron.generation.pages import PagePool
from step_megatron.generation.prompts import PromptReader
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.generation.rows import Rows
from step_megatron.generation.scheduler import Scheduler
from step_megatron.generation.sequence import Group
from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.runtime import seeds

_PAGE = 16


class Engine:
    """Generates with a model's own weights; no copy is made of them.

    Args:
        model: not wrapped, the whole decoder on one pipeline stage.
        config: rows, memory, chunks.
        for_policy: samples train a policy by their log-probabilities, so what changes the distribution token by token in a way
            that the trainer does not compute (a repetition penalty) is refused.

    Attributes:
        weight_version: of the weights that the model holds now; every sample carries it.
        longest: prompt and sample together may have so many tokens.

    Raises:
        ValueError: a pipelined model, or settings that do not fit it.
    """

    def __init__(self, model: AudioLanguageModel, config: GenerationConfig | None = None, *, for_policy: bool = False):
        check_layout(model)
        self.model, self.config, self.for_policy = model, config or GenerationConfig(), for_policy
        self.weight_version = 0
        self._positions = model.rotary.cos.shape[0]
        longest = min(self.config.max_length or self._positions, self._positions)
        pages = min(self.config.rows * -(-longest // _PAGE), -(-self.config.cache_tokens // _PAGE))
        self.longest = min(longest, pages * _PAGE)
        # One more than anybody can have: where rows that fill up a batch write.
        self.pool = PagePool(pages + 1, _PAGE)
        invariant = self.config.batch_invariant
        self.scheduler = Scheduler(
            self.pool, self.config.rows, self.config.prefill_chunk, self.config.prefill_tokens, replay=invariant
        )
        self._forward = Forward(model, self.config.invariant_rows if invariant else 0)
        self._device_side: tuple[KeyValueCache, PromptReader, Decoder] | None = None

    def weights_changed(self) -> None:
        """The model has new weights: samples from now on carry a new version.

        Raises:
            RuntimeError: samples are on their way; their cache holds what the old weights computed.
        """
        if not self.scheduler.idle:
            raise RuntimeError("the weights changed while samples were being generated; let them end, or cancel them, before")
        self.weight_version += 1

    def release_cache(self) -> None:
        """Give the cache's memory back; the next sample allocates it again.

        Raises:
            RuntimeError: samples are on their way.
        """
        if not self.scheduler.idle:
            raise RuntimeError("the cache is in use: let the samples end, or cancel them, before it is released")
        self._device_side = None

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.idle

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache holds now."""
        return 0 if self._device_side is None else self._device_side[0].bytes

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
            ValueError: see `add`.
        """
        if isinstance(sampling, Sampling):
            sampling = sample_seeds(sampling, range(len(prompts)), samples)
        if len(sampling) != len(prompts) * samples:
            raise ValueError(f"{len(sampling)} samplings for {len(prompts)} prompts with {samples} samples each")
        parts = [list(sampling[i * samples : (i + 1) * samples]) for i in range(len(prompts))]
        for index, (prompt, part) in enumerate(zip(prompts, parts, strict=True)):
            self._check(prompt, part, f"prompt {index}")
        groups = [self._group(prompt, part) for prompt, part in zip(prompts, parts, strict=True)]
        results = [sequence.result for group in groups for sequence in group.waiting]
        for group in groups:
            self.scheduler.add(group)
        with self.running():
            while not self.idle:
                ended = self.step()
                if progress and ended:
                    progress(ended)
        return results

    def add(self, prompt: Prompt, samplings: Sequence[Sampling], name: str = "the prompt") -> Group:
        """Queue a prompt with one sample for each sampling; `step` moves it on, and the results fill as it does.

        Raises:
            ValueError: names the prompt: it is empty or ends in audio, placeholders do not fit the audio, a sample could outgrow
                the positions or the cache, or it has a repetition penalty `for_policy`.
        """
        self._check(prompt, samplings, name)
        group = self._group(prompt, samplings)
        self.scheduler.add(group)
        return group

    def cancel(self, group: Group) -> None:
        """End the samples of a prompt that have not ended."""
        for sequence in group.members:
            if not sequence.done:
                sequence.result.finish_reason = "cancelled"
                self.scheduler.finish(sequence)
        self.scheduler.admit()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where `step` may be called: evaluation mode, no gradients, no sequence parallelism; all is restored after."""
        with torch.inference_mode(), generation_mode(self.model):
            yield

    def step(self) -> int:
        """Read one pass of prompt chunks and decode one token of every running sample; the number of samples that ended."""
        cache, read, decode = self._on_device()
        scheduler = self.scheduler
        self._admit(cache)
        if chunks := scheduler.chunks():
            read(chunks)
            scheduler.read(chunks)
            self._admit(cache)
        scheduler.make_room()
        if not scheduler.running:
            return 0
        running = list(scheduler.running)
        ended = 0
        for sequence, token, logprob in zip(running, *decode.step(running), strict=True):
            new = sequence.reads_last
            sequence.computed += 1
            if new and (reason := sequence.accept(token, logprob)):
                sequence.result.finish_reason = reason
                scheduler.finish(sequence)
                ended += 1
        return ended

    def _admit(self, cache: KeyValueCache) -> None:
        self.scheduler.admit()
        cache.copy(self.scheduler.copies)
        self.scheduler.copies.clear()

    def _on_device(self) -> tuple[KeyValueCache, PromptReader, Decoder]:
        """The cache and what works on it, allocated when it is first needed."""
        if self._device_side is None:
            model, config = self.model.config, self.config
            device = self.model.rotary.cos.device
            groups = max(1, model.num_query_groups // model.tensor_model_parallel_size)
            cache = KeyValueCache(model.num_layers, self.pool.pages, _PAGE, groups, model.kv_channels, model.params_dtype, device)
            block = config.invariant_rows if config.batch_invariant else 1
            rows = Rows(-(-config.rows // block) * block, self.pool.needed(self.longest), _PAGE, self._forward.vocabulary, device)
            decoder = Decoder(self._forward, rows, cache, config.rows, config.cuda_graphs and device.type == "cuda", block)
            self._device_side = cache, PromptReader(self._forward, cache, _PAGE, device), decoder
        return self._device_side

    def _group(self, prompt: Prompt, samplings: Sequence[Sampling]) -> Group:
        return Group(prompt, list(samplings), [Generation(weight_version=self.weight_version) for _ in samplings])

    def _check(self, prompt: Prompt, samplings: Sequence[Sampling], name: str) -> None:
        tokens = len(prompt.tokens)
        if not tokens:
            raise ValueError(f"{name} is empty")
        expected = sum(self.model.adaptor.tokens_out(frames) for frames in prompt.encoder_frames)
        if expected != len(prompt.audio_positions):
            raise ValueError(f"{name}: {len(prompt.audio_positions)} placeholders for {expected} audio tokens")
        if expected and prompt.audio_positions[-1] == tokens - 1:
            raise ValueError(f"{name} ends in audio; let text follow it, if only a token that opens the reply")
        most = max(sampling.max_new_tokens for sampling in samplings)
        if tokens + most > self._positions:
            raise ValueError(
                f"{name} has {tokens} tokens; with max_new_tokens={most} it can outgrow model.max_positions={self._positions}: "
                "shorten it, or allow fewer new tokens"
            )
        if tokens + most - 1 > self.longest:
            raise ValueError(
                f"{name} has {tokens} tokens; with max_new_tokens={most} it can outgrow the cache's {self.longest}: allow fewer "
                "new tokens, or raise generation.cache_tokens (and generation.max_length where it is set)"
            )
        if self.for_policy and any(sampling.repetition_penalty != 1 for sampling in samplings):
            raise ValueError(
                "repetition_penalty is refused where samples train a policy: the trainer's log-probabilities know nothing of it, "
                "so every ratio would be wrong; set it to 1"
            )


def sample_seeds(sampling: Sampling, prompts: Sequence[int], samples: int) -> list[Sampling]:
    """The sampling of every sample, prompts first: a seed of its own from that of `sampling`, the prompt's index and its own."""
    indices = [(prompt, sample) for prompt in prompts for sample in range(samples)]
    return [dataclasses.replace(sampling, seed=seeds.derive(sampling.seed, *each)) for each in indices]
