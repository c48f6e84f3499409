"""Text from prompts with audio: packed prefill, then batched decoding in which every row has its own length.

The model is the one that trains: same weights, same layers, same merge of the audio. Prompts are packed, never padded; then every
step gives each unfinished row one token. Tensor parallelism works as in training: the ranks of a group sample the same tokens,
because they see the same gathered logits. Data-parallel ranks share prompts out themselves.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.model.batch import ModelBatch
from step_megatron.model.decode_step import DecodeStep, can_step
from step_megatron.model.kv_cache import KeyValueCache
from step_megatron.model.sampling import Sampler, Sampling
from step_megatron.model.segments import PackedSegments, pack_segments


@dataclass
class Prompt:
    """One prompt.

    Attributes:
        tokens: ids, with a placeholder for every audio token.
        audio_positions: index into `tokens` of every placeholder, in order.
        audio_features: `[sum(encoder_frames), encoder_width]`, chunks back to back; None without audio.
        encoder_frames: 25 Hz frames of every chunk.
    """

    tokens: Sequence[int]
    audio_positions: Sequence[int] = ()
    audio_features: torch.Tensor | None = None
    encoder_frames: tuple[int, ...] = ()


@dataclass
class Generation:
    """What came of one prompt.

    Attributes:
        tokens: generated ids, the stop token included.
        finish_reason: `stop` (a stop token) or `length` (as many as allowed).
        logprobs: log-probability of each token under the model's own distribution (temperature 1, not truncated).
        forced: how many of the tokens the reasoning budget put there.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logprobs: list[float] = field(default_factory=list)
    forced: int = 0


@dataclass(frozen=True)
class ReasoningBudget:
    """End the reasoning of rows that do not end it themselves.

    Attributes:
        tokens: a row that has generated so many without ending its reasoning gets `closing`.
        closing: ids put there, such as those of a newline and `</think>`.
        endings: id sequences; a row that has generated one of them has ended its reasoning.
    """

    tokens: int
    closing: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]


def generate(
    model: AudioLanguageModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    min_new_tokens: int = 0,
    budget: ReasoningBudget | None = None,
    batch_size: int = 64,
    prefill_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; collective over the tensor-parallel group.

    Args:
        model: not wrapped, on one pipeline stage; its mode (`train`/`eval`) is restored.
        prompts: any number; the order of the results is theirs.
        max_new_tokens: most tokens generated for a prompt.
        stop_ids: ids that end a row.
        temperature, top_p, seed: see `sampling.Sampling`; a row's draws depend on the seed and its index only.
        min_new_tokens: a row cannot stop before it has so many.
        budget: bounds the reasoning.
        batch_size: rows decoded together.
        prefill_tokens: prompt tokens in one forward pass, except that a longer prompt goes alone.
        progress: called with the number of prompts finished since the last call.

    Raises:
        ValueError: a pipelined model, an empty prompt, placeholders that do not fit the audio, a row that could outgrow the
            positions, or sampling arguments out of range.
    """
    _check(model, prompts, max_new_tokens)
    sampler = Sampler(Sampling(temperature, top_p, seed), range(len(prompts)))
    results = [Generation() for _ in prompts]
    # Rows of like length share a batch, so that little of the cache is empty.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].tokens))
    with torch.inference_mode(), _generation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            decoder = _Decoder(model, {row: prompts[row] for row in rows}, max_new_tokens, prefill_tokens)
            choose = _Chooser(sampler, results, max_new_tokens, frozenset(stop_ids), min_new_tokens, budget)
            _run(decoder, choose, rows, progress)
    return results


def _run(decoder: "_Decoder", choose: "_Chooser", rows: list[int], progress: Callable[[int], None] | None) -> None:
    """Decode one batch to its end."""
    logits = decoder.prefill()
    # `rows[i]` is the prompt in cache row `i`; finished rows stay until enough of them make a copy of the cache worth it.
    live = set(rows)
    while True:
        tokens, finished = choose(logits, rows, live)
        live -= finished
        if progress and finished:
            progress(len(finished))
        if not live:
            return
        if len(live) <= 0.75 * len(rows):
            places = [place for place, row in enumerate(rows) if row in live]
            decoder.keep(places)
            rows, tokens = [rows[place] for place in places], [tokens[place] for place in places]
        logits = decoder.step(tokens)


class _Chooser:
    """Chooses the next token of every row and writes it down: sampling, stop ids, minimum length, reasoning budget."""

    def __init__(
        self,
        sampler: Sampler,
        results: list[Generation],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        min_new_tokens: int,
        budget: ReasoningBudget | None,
    ):
        self.sampler, self.results, self.budget = sampler, results, budget
        self.max_new_tokens, self.min_new_tokens, self.stop_ids = max_new_tokens, min_new_tokens, stop_ids
        self._forced: dict[int, list[int]] = {}
        self._closed: set[int] = set()

    def __call__(self, logits: torch.Tensor, rows: list[int], live: set[int]) -> tuple[list[int], set[int]]:
        """Tokens for all rows (finished ones too, to keep the batch's shape) and the rows that finished with them."""
        drawn = self.sampler(self._without_early_stops(logits, rows), rows)
        forced = [self._next_forced(row) if row in live else None for row in rows]
        if any(token is not None for token in forced):
            drawn = torch.tensor(
                [token if f is None else f for token, f in zip(drawn.tolist(), forced, strict=True)], device=logits.device
            )
        chosen = logits.gather(-1, drawn[:, None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        tokens, logprobs = drawn.tolist(), chosen.tolist()
        finished = set()
        for place, row in enumerate(rows):
            if row not in live:
                continue
            result = self.results[row]
            result.tokens.append(tokens[place])
            result.logprobs.append(logprobs[place])
            result.forced += forced[place] is not None
            if tokens[place] in self.stop_ids and forced[place] is None:
                result.finish_reason = "stop"
                finished.add(row)
            elif len(result.tokens) >= self.max_new_tokens:
                finished.add(row)
        return tokens, finished

    def _without_early_stops(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        early = [place for place, row in enumerate(rows) if len(self.results[row].tokens) < self.min_new_tokens]
        if not early or not self.stop_ids:
            return logits
        logits = logits.clone()
        places = torch.tensor(early, device=logits.device)[:, None]
        logits[places, torch.tensor(sorted(self.stop_ids), device=logits.device)] = float("-inf")
        return logits

    def _next_forced(self, row: int) -> int | None:
        """The token that the reasoning budget puts next in this row, None if the row is free."""
        if self.budget is None or row in self._closed:
            return None
        if row in self._forced:
            queue = self._forced[row]
            token = queue.pop(0)
            if not queue:
                self._closed.add(row)
            return token
        tokens = self.results[row].tokens
        if any(len(ending) <= len(tokens) and tuple(tokens[-len(ending) :]) == ending for ending in self.budget.endings):
            self._closed.add(row)
            return None
        if len(tokens) < self.budget.tokens or not self.budget.closing:
            return None
        self._forced[row] = list(self.budget.closing)
        return self._next_forced(row)


class _Decoder:
    """Forward passes over one batch of rows with its key-value cache."""

    def __init__(self, model: AudioLanguageModel, prompts: dict[int, Prompt], max_new_tokens: int, prefill_tokens: int):
        self.model, self.prompts, self.prefill_tokens = model, list(prompts.values()), prefill_tokens
        self.device = model.rotary.cos.device
        self.lengths = [len(prompt.tokens) for prompt in self.prompts]
        self.positions = torch.tensor(self.lengths, device=self.device)
        self._lean = DecodeStep(model.language_model) if can_step(model.language_model) else None
        # The last token is never fed back.
        self.cache = KeyValueCache(len(self.prompts), max(self.lengths) + max_new_tokens - 1, self.device)

    def prefill(self) -> torch.Tensor:
        """Logits of the first new token of every row, `[rows, vocabulary]` float32."""
        logits = []
        for first, last in _slices(self.lengths, self.prefill_tokens):
            prompts, lengths = self.prompts[first:last], self.lengths[first:last]
            batch = _prompt_batch(prompts, self.device)
            rows = np.repeat(np.arange(first, last), lengths)
            self.cache.begin_prefill(torch.from_numpy(rows).to(self.device))
            hidden = self._decode(self.model.embed(batch), batch.packed)
            ends = torch.from_numpy(np.cumsum(lengths) - 1).to(self.device)
            logits.append(self._logits(hidden.index_select(0, ends)))
        return torch.cat(logits)

    def step(self, tokens: list[int]) -> torch.Tensor:
        """Feed one token of every row; logits of the next ones, `[rows, vocabulary]` float32."""
        self.cache.begin_decode(self.positions)
        ids = torch.tensor(tokens, device=self.device).unsqueeze(0)
        embeddings = self.model.language_model.embedding(input_ids=ids, position_ids=None)
        if self._lean is not None:
            rotary = self.model.rotary(self.positions, embeddings.dtype)
            hidden = self._lean(embeddings.squeeze(1), self.cache, self.positions, rotary).unsqueeze(1)
        else:
            packed = PackedSegments(qkv_format="thd", position_ids=self.positions, segment_lengths=(1,) * len(tokens))
            hidden = self._decode(embeddings, packed)
        self.positions = self.positions + 1
        return self._logits(hidden)

    def keep(self, places: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(places, device=self.device)
        self.cache.keep(index)
        self.positions = self.positions.index_select(0, index)

    def _decode(self, embeddings: torch.Tensor, packed: PackedSegments) -> torch.Tensor:
        packed.rotary = self.model.rotary(packed.position_ids, embeddings.dtype)
        packed.cache = self.cache
        return self.model.language_model.decoder(hidden_states=embeddings, attention_mask=None, packed_seq_params=packed)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        language_model = self.model.language_model
        weight = language_model.shared_embedding_or_output_weight() if self.model.share_embeddings_and_output_weights else None
        logits, _ = language_model.output_layer(hidden, weight=weight, runtime_gather_output=True)
        return logits.squeeze(1).float()


def _prompt_batch(prompts: Sequence[Prompt], device: torch.device) -> ModelBatch:
    lengths = [len(prompt.tokens) for prompt in prompts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = torch.from_numpy(np.concatenate([np.asarray(prompt.tokens, dtype=np.int64) for prompt in prompts]))
    batch = ModelBatch(tokens.unsqueeze(0).to(device), pack_segments(lengths, device))
    features = [prompt.audio_features for prompt in prompts if prompt.audio_features is not None]
    if features:
        batch.audio_features = torch.cat([part.to(device) for part in features])
        batch.encoder_frames = tuple(frames for prompt in prompts for frames in prompt.encoder_frames)
        places = [
            start + np.asarray(prompt.audio_positions, dtype=np.int64) for start, prompt in zip(starts, prompts, strict=False)
        ]
        batch.audio_positions = torch.from_numpy(np.concatenate(places)).to(device)
    return batch


def _slices(lengths: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose lengths add up to at most `limit`, at least one row each."""
    first, total = 0, 0
    for row, length in enumerate(lengths):
        if row > first and total + length > limit:
            yield first, row
            first, total = row, 0
        total += length
    yield first, len(lengths)


def _check(model: AudioLanguageModel, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    if not (model.pre_process and model.post_process):
        raise ValueError(
            "generation needs the whole decoder on one pipeline stage: start it with "
            "megatron.transformer.pipeline_model_parallel_size=1 (checkpoints load in any layout)"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    positions = model.rotary.cos.shape[0]
    for index, prompt in enumerate(prompts):
        if not len(prompt.tokens):
            raise ValueError(f"prompt {index} is empty")
        if len(prompt.tokens) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {index} has {len(prompt.tokens)} tokens; with max_new_tokens={max_new_tokens} it can outgrow "
                f"model.max_positions={positions}: shorten it, or allow fewer new tokens"
            )
        expected = sum(model.adaptor.tokens_out(frames) for frames in prompt.encoder_frames)
        if expected != len(prompt.audio_positions):
            raise ValueError(f"prompt {index}: {len(prompt.audio_positions)} placeholders for {expected} audio tokens")


@contextlib.contextmanager
def _generation_mode(model: AudioLanguageModel) -> Iterator[None]:
    """Evaluation mode without sequence parallelism, which cannot split the few tokens of a decoding step."""
    training, split = model.training, model.config.sequence_parallel
    holders = [module for module in model.modules() if getattr(module, "sequence_parallel", False)]
    try:
        model.eval()
        model.config.sequence_parallel = False
        for module in holders:
            module.sequence_parallel = False
        yield
    finally:
        for module in holders:
            module.sequence_parallel = True
        model.config.sequence_parallel = split
        model.train(training)
