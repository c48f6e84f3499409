"""What one decoding step reads of every row, in buffers that stay where they are.

On the host the buffers are NumPy arrays (in pinned memory beside a GPU), filled from the sequences; what a step reads is then
copied. On a CPU the device's tensors are the same memory.
"""

from collections.abc import Sequence as Sequences
from dataclasses import replace

import numpy as np
import torch

from step_megatron.generation.cache import KeyValueCache, Pass
from step_megatron.generation.pages import SPARE_PAGE
from step_megatron.generation.request import MOST_STOPS
from step_megatron.generation.sampling import Needs, RowSettings
from step_megatron.generation.sequence import Sequence

_INTEGERS = ("tokens", "positions", "slots", "seeds", "draws", "forced", "top_k")
_FLOATS = ("temperature", "top_p", "penalty")
_FREE = -1


class _Buffer:
    """An array on the host and its copy on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        pinned = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.host = pinned.numpy()
        self.device = pinned if device.type == "cpu" else torch.zeros_like(pinned, device=device)
        self._source = pinned

    def upload(self) -> None:
        """Bring the host's values to the device; the host does not wait."""
        if self.device is not self._source:
            self.device.copy_(self._source, non_blocking=True)


class Rows:
    """Rows `0 .. n - 1` are running sequences; those beyond, up to a bucket's size, fill it up and write to the spare page.

    Args:
        rows: most rows.
        pages: most pages of a sequence.
        size: tokens of a page.
        vocabulary: ids.
        device: of the model.
    """

    def __init__(self, rows: int, pages: int, size: int, vocabulary: int, device: torch.device):
        self.size, self.vocabulary = size, vocabulary
        self._integers = _Buffer((len(_INTEGERS), rows), torch.int64, device)
        self._floats = _Buffer((len(_FLOATS), rows), torch.float32, device)
        self._lengths = _Buffer((rows,), torch.int32, device)
        self._table = _Buffer((rows, pages), torch.int32, device)
        self._banned = _Buffer((rows, MOST_STOPS), torch.int64, device)
        self._ban = _Buffer((rows, MOST_STOPS), torch.float32, device)
        self._bounds = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._seen: torch.Tensor | None = None
        self._host = dict(zip((*_INTEGERS, *_FLOATS), (*self._integers.host, *self._floats.host), strict=True))
        self._needs = Needs()
        # What stands in each row, and how many of its pages the table has.
        self._owners: list[Sequence] = []
        self._written: list[int] = []

    def fill(self, running: Sequences[Sequence], bucket: int) -> Needs:
        """Write down what the next step reads of these sequences, in `bucket` rows; returns what they ask for."""
        self._place(running)
        count, host = len(running), self._host
        positions = host["positions"][:count]
        positions[:] = [sequence.computed for sequence in running]
        host["tokens"][:count] = [sequence.tokens[sequence.computed] for sequence in running]
        host["draws"][:count] = [sequence.drawn for sequence in running]
        host["forced"][:count] = [_FREE if forced is None else forced for forced in map(Sequence.forced, running)]
        pages = self._table.host[np.arange(count), positions // self.size]
        host["slots"][:count] = pages.astype(np.int64) * self.size + positions % self.size
        self._lengths.host[:count] = positions + 1
        if bucket > count:
            self._pad(count, bucket)
        needs = self._ban_stops(running)
        for buffer in (self._integers, self._lengths):
            buffer.upload()
        return needs

    def work(self, bucket: int, cache: KeyValueCache) -> tuple[torch.Tensor, torch.Tensor, Pass]:
        """Tokens and positions `[bucket]` of the step, and where it reads and writes."""
        tokens, positions, slots = (self._integers.device[_INTEGERS.index(name), :bucket] for name in _INTEGERS[:3])
        bounds = self._bounds[: bucket + 1]
        return tokens, positions, Pass(cache, slots, self._table.device[:bucket], self._lengths.device[:bucket], bounds, 1)

    def settings(self, bucket: int) -> RowSettings:
        """How the rows' tokens are chosen."""
        names = (*_INTEGERS, *_FLOATS)
        tensors = dict(zip(names, (*self._integers.device, *self._floats.device), strict=True))
        chosen = {name: tensors[name][:bucket] for name in names[3:]}
        seen = None if self._seen is None else self._seen[:bucket]
        return RowSettings(**chosen, banned=self._banned.device[:bucket], ban=self._ban.device[:bucket], seen=seen)

    def _place(self, running: Sequences[Sequence]) -> None:
        """Give every sequence its row, and bring the table up to the pages that it has."""
        del self._owners[len(running) :], self._written[len(running) :]
        changed = False
        for row, sequence in enumerate(running):
            if row < len(self._owners) and self._owners[row] is sequence and self._written[row] == len(sequence.pages):
                continue
            changed = True
            if row == len(self._owners):
                self._owners.append(sequence)
                self._written.append(0)
            if self._owners[row] is not sequence or not self._written[row]:
                self._settle(row, sequence)
            self._table.host[row, : len(sequence.pages)] = sequence.pages
            self._owners[row], self._written[row] = sequence, len(sequence.pages)
        if changed:
            self._table.upload()
            self._floats.upload()
            samplings = [sequence.sampling for sequence in running]
            self._needs = Needs(
                draws=any(each.temperature > 0 for each in samplings),
                truncates=any(each.top_k or each.top_p < 1 for each in samplings),
                penalises=any(each.repetition_penalty != 1 for each in samplings),
            )

    def _settle(self, row: int, sequence: Sequence) -> None:
        """Settings of a sequence that is new in its row."""
        sampling, host = sequence.sampling, self._host
        host["seeds"][row], host["top_k"][row] = sampling.seed, sampling.top_k
        host["temperature"][row], host["top_p"][row] = sampling.temperature, sampling.top_p
        host["penalty"][row] = sampling.repetition_penalty
        if sampling.repetition_penalty == 1:
            return
        if self._seen is None:
            rows, device = len(self._lengths.host), self._table.device.device
            self._seen = torch.zeros(rows, self.vocabulary, dtype=torch.bool, device=device)
        self._seen[row] = False
        self._seen[row, torch.tensor(sorted(set(sequence.tokens)), device=self._seen.device)] = True

    def _ban_stops(self, running: Sequences[Sequence]) -> Needs:
        """Ban the stop ids of the rows that have too few tokens to stop."""
        early = [(row, s.sampling.stop_ids) for row, s in enumerate(running) if s.drawn < s.sampling.min_new_tokens]
        if not early:
            return self._needs
        self._banned.host[:], self._ban.host[:] = 0, 0
        for row, ids in early:
            self._banned.host[row, : len(ids)], self._ban.host[row, : len(ids)] = ids, -np.inf
        for buffer in (self._banned, self._ban):
            buffer.upload()
        return replace(self._needs, bans=True)

    def _pad(self, count: int, bucket: int) -> None:
        self._integers.host[:, count:bucket] = 0
        self._host["forced"][count:bucket] = _FREE
        self._host["slots"][count:bucket] = SPARE_PAGE * self.size
        self._lengths.host[count:bucket] = 1
        self._table.host[count:bucket, 0] = SPARE_PAGE
        self._floats.host[:, count:bucket] = 0
