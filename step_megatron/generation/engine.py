"""The engine: prompts in, samples out, with the weights of the model that trains.

    engine = Engine(model, config.generation)
    generations = engine.generate(prompts, Sampling(temperature=1.0, max_new_tokens=512), samples=16)

A step starts what there is room for, reads one pass of prompt chunks, and decodes one token of every running sample.
Tensor-parallel ranks call it with the same arguments and come to the same decisions, for they see the same logits. Data-parallel
ranks share prompts out (`data_parallel.generate`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from step_megatron.config.schema import GenerationConfig
from step_megatron.generation.cache import KeyValueCache
from step_megatron.generation.decode import Decoder
from step_megatron.generation.forward import Forward
from step_megatron.generation.interface import RolloutEngine
from step_megatron.generation.layout import check_layout, generation_mode
from step_megatron.generation.pages import PagePool
from step_megatron.generation.prompts import PromptReader
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.generation.rows import Rows
from step_megatron.generation.scheduler import Scheduler
from step_megatron.generation.sequence import Group
from step_megatron.model.audio_lm import AudioLanguageModel

_PAGE = 16


class Engine(RolloutEngine):
    """Generates with a model's own weights; no copy is made of them.

    Args:
        model: not wrapped, the whole decoder on one pipeline stage.
        config: rows, memory, chunks.
        for_policy: samples train a policy by their log-probabilities, so what changes the distribution token by token in a way
            that the trainer does not compute (a repetition penalty) is refused.

    Attributes:
        longest: prompt and sample together may have so many tokens.

    Raises:
        ValueError: a pipelined model, or settings that do not fit it.
    """

    def __init__(self, model: AudioLanguageModel, config: GenerationConfig | None = None, *, for_policy: bool = False):
        check_layout(model)
        self.model, self.config, self.for_policy = model, config or GenerationConfig(), for_policy
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

    def release_cache(self) -> None:
        """Give the cache's memory back; the next sample allocates it again.

        Raises:
            RuntimeError: samples are on their way.
        """
        self._refuse_if_busy("the cache is in use")
        self._device_side = None

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.scheduler.idle

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache holds now."""
        return 0 if self._device_side is None else self._device_side[0].bytes

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

    def _queue(self, prompt: Prompt, samplings: Sequence[Sampling]) -> Group:
        group = Group(prompt, list(samplings), [Generation(weight_version=self.weight_version) for _ in samplings])
        self.scheduler.add(group)
        return group

    def _check(self, prompt: Prompt, samplings: Sequence[Sampling], name: str) -> None:
        """Refuse a prompt that is empty or ends in audio, placeholders that do not fit the audio, a sample that could outgrow the
        positions or the cache, and `for_policy` a repetition penalty."""
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
