"""The key-value cache of generation: one block of memory in pages, shared by all sequences, and what a pass does to it."""

from dataclasses import dataclass

import torch
from step_kernels import paged_attention, rope_to_cache

from step_megatron.generation.pages import SPARE_PAGE
from step_megatron.model.segments import PackedSegments

Rotary = tuple[torch.Tensor, torch.Tensor]


class KeyValueCache:
    """Rotated keys and values of all layers.

    Args:
        layers: of this rank.
        pages: the spare one included.
        size: tokens of a page.
        groups: key-value heads of this rank.
        width: of a head.
        dtype, device: of the model.
    """

    def __init__(
        self, layers: int, pages: int, size: int, groups: int, width: int, dtype: torch.dtype, device: torch.device | str
    ):
        self._storage = torch.empty(layers, 2, pages, size, groups, width, dtype=dtype, device=device)
        self._storage[:, :, SPARE_PAGE] = 0
        # Views are made once: at one token a row, making them again would show.
        self.layers = [(keys, values) for keys, values in self._storage]

    @property
    def bytes(self) -> int:
        """Memory that the cache takes."""
        return self._storage.nbytes

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy pages `(from, to)`; all are read before any is written."""
        if pairs:
            source, target = torch.tensor(pairs, device=self._storage.device).T
            self._storage.index_copy_(2, target, self._storage.index_select(2, source))


@dataclass
class Pass:
    """What goes through the layers together: new tokens of some sequences, and where they belong.

    Attributes:
        cache: where their keys and values go.
        slots: `[T]` int64, place of each token in the cache: page times the page's size, plus the place in the page.
        table: `[sequences, pages]` int32, pages of each sequence, in order.
        lengths: `[sequences]` int32, tokens in the cache with this pass.
        bounds: `[sequences + 1]` int32, cumulative new tokens.
        most: the most new tokens of a sequence.
    """

    cache: KeyValueCache
    slots: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    bounds: torch.Tensor
    most: int

    def rotate_and_attend(self, layer: int, qkv: torch.Tensor, rotary: Rotary, scale: float) -> torch.Tensor:
        """Rotate, store and attend, from the product of query, key and value.

        Args:
            layer: counted from 0.
            qkv: `[T, groups, queries + 2, width]`: a group's query heads, its key, its value.
            rotary: cosine and sine of the tokens' positions, each `[T, width]`.
            scale: factor of the scores.

        Returns:
            `[T, groups * queries, width]`.
        """
        keys, values = self.cache.layers[layer]
        query = self.rotate_and_store(layer, qkv, rotary)
        return paged_attention(query, keys, values, self.table, self.lengths, self.bounds, self.most, scale)

    def rotate_and_store(self, layer: int, qkv: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """The first half of it: the rotated queries, `[T, groups * queries, width]`."""
        return rope_to_cache(qkv, *rotary, *self.cache.layers[layer], self.slots)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSegments, scale: float
    ) -> torch.Tensor:
        """The same where Megatron's layers run (`attention.PackedCausalAttention`): they count from 1 and have rotated already.

        Args:
            query: `[T, heads, width]`; key, value: `[T, groups, width]`.
        """
        keys, values = self.cache.layers[layer - 1]
        for held, new in ((keys, key), (values, value)):
            held.flatten(0, 1).index_copy_(0, self.slots, new)
        return paged_attention(query.contiguous(), keys, values, self.table, self.lengths, self.bounds, self.most, scale)
