"""Passes over chunks of prompts: embeddings with the audio merged in, keys and values into the cache, no logits."""

import itertools
from collections.abc import Sequence as Sequences

import numpy as np
import torch
from step_kernels.segments import cumulative

from step_megatron.generation.cache import KeyValueCache, Pass
from step_megatron.generation.forward import Forward
from step_megatron.generation.scheduler import Chunk


class PromptReader:
    """Reads chunks of prompts into the cache.

    Args:
        forward: the model.
        cache: where keys and values go.
        size: tokens of a page.
        device: of the model.
    """

    def __init__(self, forward: Forward, cache: KeyValueCache, size: int, device: torch.device):
        self._forward, self._cache, self._size, self._device = forward, cache, size, device

    def __call__(self, chunks: Sequences[Chunk]) -> None:
        """One pass over these chunks, packed."""
        lengths = [chunk.end - chunk.start for chunk in chunks]
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        table = np.zeros((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), np.int32)
        for row, chunk in enumerate(chunks):
            table[row, : len(chunk.sequence.pages)] = chunk.sequence.pages
        rows = np.repeat(np.arange(len(chunks)), lengths)
        slots = table[rows, positions // self._size].astype(np.int64) * self._size + positions % self._size
        ends = np.array([chunk.end for chunk in chunks], np.int32)
        work = Pass(
            self._cache,
            self._to_device(slots),
            self._to_device(table),
            self._to_device(ends),
            cumulative(lengths, self._device),
            max(lengths),
        )
        self._forward.read(self._embed(chunks, lengths), self._to_device(positions), work)

    def _embed(self, chunks: Sequences[Chunk], lengths: list[int]) -> torch.Tensor:
        tokens = itertools.chain.from_iterable(chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks)
        hidden = self._forward.embed(self._to_device(np.fromiter(tokens, np.int64, sum(lengths))))
        for first, chunk in zip(itertools.accumulate(lengths, initial=0), chunks, strict=False):
            group = chunk.sequence.group
            places = np.asarray(group.prompt.audio_positions, np.int64)
            # Positions are in order: those of the chunk are neighbours.
            begin, end = np.searchsorted(places, (chunk.start, chunk.end))
            if begin == end:
                continue
            if group.audio is None:
                group.audio = self._forward.adapt(group.prompt.audio_features, group.prompt.encoder_frames)
            hidden.index_copy_(0, self._to_device(places[begin:end] - chunk.start + first), group.audio[begin:end])
        return hidden

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
