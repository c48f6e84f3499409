"""One decoding step: every row reads one token and gets the next.

The step is a function of buffers that stay where they are (`rows.py`) and reads nothing back, so on a GPU it is captured once for
every batch size of a ladder and every kind of sampling, and replayed as one CUDA graph (written, not run on a GPU).
"""

from collections.abc import Sequence as Sequences

import torch

from step_megatron.generation.cache import KeyValueCache
from step_megatron.generation.forward import Forward
from step_megatron.generation.rows import Rows
from step_megatron.generation.sampling import Needs, choose
from step_megatron.generation.sequence import Sequence

_WARM_UP = 2


class Decoder:
    """Runs decoding steps.

    Args:
        forward: the model.
        rows: the buffers.
        cache: keys and values.
        graphs: replay captured graphs; batches are then filled up to a power of two.
        block: rows come in multiples of this (1: as they are).
    """

    def __init__(self, forward: Forward, rows: Rows, cache: KeyValueCache, most: int, graphs: bool, block: int = 1):
        self._forward, self._rows, self._cache = forward, rows, cache
        self._most, self._graphs, self._block = most, graphs, block
        self._captured: dict[tuple[int, Needs], tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, running: Sequences[Sequence]) -> tuple[list[int], list[float]]:
        """The next token of every sequence and its log-probability."""
        count = len(running)
        bucket = self.bucket(count)
        needs = self._rows.fill(running, bucket)
        tokens, logprobs = self._replay(bucket, needs) if self._graphs else self.run(bucket, needs)
        return tokens.tolist()[:count], logprobs.tolist()[:count]

    def bucket(self, count: int) -> int:
        """Rows of the step for so many sequences."""
        if self._graphs:
            count = min(1 << (count - 1).bit_length(), self._most)
        return -(-count // self._block) * self._block

    def run(self, bucket: int, needs: Needs) -> tuple[torch.Tensor, torch.Tensor]:
        """The step itself: tokens and log-probabilities, each `[bucket]`."""
        ids, positions, work = self._rows.work(bucket, self._cache)
        settings = self._rows.settings(bucket)
        if needs.penalises:
            settings.seen.scatter_(1, ids[:, None], True)
        hidden = self._forward.layers(self._forward.embed(ids), positions, work)
        return choose(self._forward.logits(hidden), settings, needs)

    def _replay(self, bucket: int, needs: Needs) -> tuple[torch.Tensor, torch.Tensor]:
        key = bucket, needs
        if key not in self._captured:
            self._captured[key] = self._capture(bucket, needs)
        graph, results = self._captured[key]
        graph.replay()
        return results

    def _capture(self, bucket: int, needs: Needs):
        # Libraries choose their kernels, and Triton compiles its own, before the capture: neither may happen within.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.run(bucket, needs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run(bucket, needs)
        return graph, results
