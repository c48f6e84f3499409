"""The key-value cache of generation: every sequence at its own length, in pages that it owns.

A sequence that is dropped takes its pages with it out of the table; nothing is copied. Attention reads what a sequence holds and
no more, however long its neighbours are.
"""

import torch
from step_kernels import causal_attention_varlen, paged_attention

from step_megatron.model.segments import PackedSegments

_PAGE = 16


class KeyValueCache:
    """Rotated keys and values of the sequences that are being generated.

    The attention layers write into it and attend through it. Between two forward passes the caller says which rows the next
    tokens belong to: whole prompts (`begin_prefill`), or one token of every row (`begin_decode`).

    Args:
        rows: sequences.
        capacity: longest sequence, in tokens.
        device: where the tokens are.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device):
        pages = -(-capacity // _PAGE)
        self._pages = rows * pages
        self._table = torch.arange(self._pages, dtype=torch.int32, device=device).view(rows, pages)
        self._caches: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # Of the tokens of this pass: row, place in the caches; in decoding also length and bounds of every row.
        self._token_rows: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._lengths: torch.Tensor | None = None
        self._bounds: torch.Tensor | None = None

    def begin_prefill(self, token_rows: torch.Tensor) -> None:
        """The next forward pass holds whole prompts, packed; `token_rows` `[T]` int64 is the cache row of every token."""
        self._token_rows, self._slots, self._lengths = token_rows, None, None

    def begin_decode(self, positions: torch.Tensor) -> None:
        """The next forward pass holds one token of every row, at `positions` `[rows]` int64."""
        self._bounds = torch.arange(len(positions) + 1, dtype=torch.int32, device=positions.device)
        self._token_rows, self._slots, self._lengths = self._bounds[:-1], None, (positions + 1).int()

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows `[n]` int64, in this order; the others are finished."""
        self._table = self._table.index_select(0, rows)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSegments,
        scale: float,
    ) -> torch.Tensor:
        """Store rotated keys and values of the tokens of this pass, and attend to all that each token may see.

        Args:
            layer: layer number.
            query: `[T, heads, head_width]`; key, value: `[T, groups, head_width]`.
            packed: gives the tokens' positions and, for prompts, their lengths.
            scale: factor of the scores.

        Returns:
            `[T, heads, head_width]`.
        """
        if self._lengths is not None:
            return self.decode(layer, query, key, value, packed.position_ids, scale)
        self._store(layer, key, value, packed.position_ids)
        return causal_attention_varlen(query, key, value, packed.cu_seqlens_q, packed.segment_lengths, scale)

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one token a row, arguments as in `attend`; a group's query heads are neighbours."""
        keys, values = self._store(layer, key, value, positions)
        return paged_attention(query, keys, values, self._table, self._lengths, self._bounds, 1, scale)

    def _store(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self._caches:
            shape = (self._pages, _PAGE, *key.shape[1:])
            self._caches[layer] = key.new_empty(shape), value.new_empty(shape)
        if self._slots is None:
            self._slots = self._table[self._token_rows, positions // _PAGE] * _PAGE + positions % _PAGE
        for cache, tokens in zip(self._caches[layer], (key, value), strict=True):
            cache.flatten(0, 1).index_copy_(0, self._slots, tokens)
        return self._caches[layer]
