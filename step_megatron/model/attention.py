"""Causal self-attention over packed segments: Megatron's `core_attention` for the torch layers, in training and generation.

Rotary embedding, grouped queries, context parallelism (keys and values are gathered, queries stay in zigzag pieces) and the
key-value cache of generation. Nothing here reads a device value: lengths come from `PackedSegments` as Python integers.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from step_kernels import causal_attention_varlen

from step_megatron.model.rope import apply_rotary
from step_megatron.model.segments import PackedSegments


class PackedCausalAttention(MegatronModule):
    """Megatron's `core_attention` for packed (`thd`) input; the signature is Megatron's.

    Args:
        config: Megatron's configuration; attention dropout must be 0.
        layer_number: 1-based, over the whole model; names the layer's key-value cache.
        softmax_scale: default `kv_channels ** -0.5`.
        pg_collection: process groups; `cp` is used with context parallelism.

    Raises:
        ValueError: attention dropout above 0 (never used by the models here, and packed dropout is not reproducible).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type=None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if attention_dropout or (attention_dropout is None and config.attention_dropout):
            raise ValueError("PackedCausalAttention has no dropout: set megatron.transformer.attention_dropout=0")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type=None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> torch.Tensor:
        """Attend within segments.

        Args:
            query: `[T_local, heads, head_width]`; key, value: `[T_local, groups, head_width]`, before rotation.
            packed_seq_params: a `PackedSegments` with `rotary` set, and with `cache` in generation.

        Returns:
            `[T_local, heads * head_width]`.

        Raises:
            TypeError: `packed_seq_params` is not a `PackedSegments` (Megatron's own class has no host lengths).
        """
        packed = packed_seq_params
        if not isinstance(packed, PackedSegments):
            raise TypeError(f"attention needs PackedSegments (see segments.pack_segments), got {type(packed).__name__}")
        query, key = apply_rotary(query, key, packed.rotary)
        if packed.cache is not None:
            out = packed.cache.attend(self.layer_number, query, key, value, packed, self.softmax_scale)
        elif self.cp_group is not None:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.cp_group).index_select(0, packed.cp_restore)
                for x in (key, value)
            )
            out = attend_zigzag(query, key, value, packed, self.softmax_scale)
        else:
            out = causal_attention_varlen(query, key, value, packed.cu_seqlens_q, packed.segment_lengths, self.softmax_scale)
        return out.flatten(1)


def attend_zigzag(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSegments, scale: float
) -> torch.Tensor:
    """Causal attention of the zigzag pieces that one context-parallel rank holds to the whole of their segments.

    Args:
        query: `[T_local, heads, head_width]`, two pieces of every segment.
        key, value: `[T, groups, head_width]`, whole segments in natural order; `heads` is a multiple of `groups`.
        packed: the segments, and which pieces this rank holds.
        scale: factor of the scores.

    Returns:
        `[T_local, heads, head_width]`.
    """
    size, rank = packed.cp_size, packed.cp_rank
    pieces = [length // (2 * size) for length in packed.segment_lengths]
    # `split`, not slices: the gradient of a slice is a zero tensor as long as the whole pack.
    queries = iter(query.split([piece for piece in pieces for _ in range(2)]))
    outputs = []
    for piece, keys, values in zip(pieces, key.split(packed.segment_lengths), value.split(packed.segment_lengths), strict=True):
        for index in (rank, 2 * size - 1 - rank):
            seen = (index + 1) * piece
            outputs.append(_causal(next(queries), keys[:seen], values[:seen], scale))
    return torch.cat(outputs)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention whose last query sees the last key; `[tokens, heads, head_width]`, groups in key and value."""
    queries, keys = query.shape[0], key.shape[0]
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
