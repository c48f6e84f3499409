"""Transformer Engine's attention with this project's rotary embedding and generation cache.

GPU only; imported by `layers` when it is asked for.

Rotation happens here and not in Megatron's layer, so that positions come from `PackedSegments` with either kind of layers.
"""

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention

from step_megatron.model.rope import apply_rotary
from step_megatron.model.segments import PackedSegments


class TransformerEngineAttention(TEDotProductAttention):
    """`TEDotProductAttention` for packed input; the same contract as `attention.PackedCausalAttention`."""

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
        packed = packed_seq_params
        query, key = apply_rotary(query, key, packed.rotary)
        if packed.cache is not None:
            scale = self.config.softmax_scale or self.config.kv_channels**-0.5
            return packed.cache.attend(self.layer_number, query, key, value, packed, scale).flatten(1)
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed.for_megatron(),
        )
