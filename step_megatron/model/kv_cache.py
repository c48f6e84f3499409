"""The key-value cache of generation: one row per sequence, every row at its own length."""

import torch
import torch.nn.functional as F
from step_kernels import causal_attention_varlen

from step_megatron.model.segments import PackedSegments


class KeyValueCache:
    """Rotated keys and values of the sequences that are being generated.

    The attention layers write into it and attend through it. Between two forward passes the caller says which rows the next
    tokens belong to: whole prompts (`begin_prefill`), or one token of every row (`begin_decode`).

    Args:
        rows: sequences.
        capacity: longest sequence, in tokens.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._token_rows: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    def begin_prefill(self, token_rows: torch.Tensor) -> None:
        """The next forward pass holds whole prompts, packed; `token_rows` `[T]` int64 is the cache row of every token."""
        self._token_rows, self._mask = token_rows, None

    def begin_decode(self, positions: torch.Tensor, longest: int) -> None:
        """The next forward pass holds one token of every row, at `positions` `[rows]` int64, all below `longest`."""
        self._token_rows = torch.arange(self.rows, device=positions.device)
        seen = torch.arange(longest, device=positions.device)[None, :] <= positions[:, None]
        self._mask = seen[:, None, None, :]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows `[n]` int64, in this order; the others are finished."""
        self.rows = rows.numel()
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, rows)

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
        if self._mask is not None:
            # The query heads of one group are the "queries" of that group: keys and values are read once, never repeated.
            grouped = query.unflatten(1, (key.shape[1], -1))
            return self.decode(layer, grouped, key, value, packed.position_ids, scale).flatten(1, 2)
        self._store(layer, key, value, packed.position_ids)
        return causal_attention_varlen(query, key, value, packed.cu_seqlens_q, packed.segment_lengths, scale)

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of one token a row; `query` `[rows, groups, heads / groups, head_width]`, the result is shaped like it."""
        self._store(layer, key, value, positions)
        longest = self._mask.shape[-1]
        keys, values = self._keys[layer][:, :, :longest], self._values[layer][:, :, :longest]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask, scale=scale)

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor) -> None:
        if layer not in self._keys:
            shape = (self.rows, key.shape[1], self.capacity, key.shape[2])
            self._keys[layer], self._values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        self._keys[layer][self._token_rows, :, positions] = key
        self._values[layer][self._token_rows, :, positions] = value
