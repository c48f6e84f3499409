"""One decoding step through the torch layers, without what a training layer carries along.

At one token a row, Megatron's layers spend most of their time outside of matrix products (about 100 module calls and autograd
functions a step for four layers). This runs the same parameters through the same maths in some twenty calls a layer. Prompts
still go through the layers themselves, and so does everything where a layer is not the plain Qwen2 or LLaMA one (see `can_step`).
Norms, rotation and SwiGLU are torch's own operators here: calling one of ours costs more than it saves at one row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel

from step_megatron.model.attention import PackedCausalAttention
from step_megatron.model.kv_cache import KeyValueCache
from step_megatron.model.lora import local_product

Product = Callable[[torch.Tensor], torch.Tensor]


def can_step(language_model: GPTModel) -> bool:
    """Whether every layer is the plain one: our attention, RMS norms, gated SiLU, no bias but that of query, key and value."""
    config = language_model.config
    plain = (
        config.normalization == "RMSNorm"
        and config.gated_linear_unit
        and config.activation_func is F.silu
        and config.activation_func_clamp_value is None
        and not (config.add_bias_linear or config.qk_layernorm or config.attention_output_gate or config.num_moe_experts)
        and not (config.apply_residual_connection_post_layernorm or config.fp32_residual_connection)
        and config.num_query_groups % config.tensor_model_parallel_size == 0
    )
    return plain and all(
        isinstance(layer.self_attention.core_attention, PackedCausalAttention) for layer in language_model.decoder.layers
    )


@dataclass(frozen=True)
class _Layer:
    """What one layer multiplies with."""

    number: int
    attention_norm: torch.Tensor
    qkv: Product
    out: Product
    mlp_norm: torch.Tensor
    gate_up: Product
    down: Product


class DecodeStep:
    """Runs one token of every row through the decoder stage of a `GPTModel` for which `can_step` holds.

    The parameters are not copied: what is trained between two steps is used.
    """

    def __init__(self, language_model: GPTModel):
        config = language_model.config
        self.group = language_model.tp_group if config.tensor_model_parallel_size > 1 else None
        self.groups = config.num_query_groups // config.tensor_model_parallel_size
        self.queries = config.num_attention_heads // config.num_query_groups
        self.width, self.eps = config.kv_channels, config.layernorm_epsilon
        self.final_norm = language_model.decoder.final_layernorm.weight
        self.layers = [
            _Layer(
                layer.layer_number,
                layer.input_layernorm.weight,
                local_product(layer.self_attention.linear_qkv),
                local_product(layer.self_attention.linear_proj),
                layer.pre_mlp_layernorm.weight,
                local_product(layer.mlp.linear_fc1),
                local_product(layer.mlp.linear_fc2),
            )
            for layer in language_model.decoder.layers
        ]
        self.scale = language_model.decoder.layers[0].self_attention.core_attention.softmax_scale

    def __call__(
        self, hidden: torch.Tensor, cache: KeyValueCache, positions: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Final hidden states, `[rows, width]`.

        Args:
            hidden: `[rows, width]` embeddings of the tokens.
            cache: `begin_decode` has been called with these positions.
            positions: `[rows]` int64.
            rotary: cosine and sine of the positions, each `[rows, 1, head_width]`.
        """
        cos, sin = (part.unsqueeze(2) for part in rotary)
        first, second = sin.chunk(2, dim=-1)
        # rotate_half(x) * sin == roll(x) * signed sin
        signed_sin = torch.cat([-first, second], dim=-1)
        for layer in self.layers:
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.attention_norm, self.eps)
            attended = self._attention(layer, normed, cache, positions, cos, signed_sin)
            hidden = hidden + self._reduced(layer.out(attended))
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            hidden = hidden + self._reduced(layer.down(F.silu(gate).mul_(up)))
        return F.rms_norm(hidden, hidden.shape[-1:], self.final_norm, self.eps)

    def _attention(self, layer: _Layer, normed, cache: KeyValueCache, positions, cos, signed_sin) -> torch.Tensor:
        # One group: its query heads, its key, its value.
        qkv = layer.qkv(normed).view(-1, self.groups, self.queries + 2, self.width)
        qk, value = qkv[:, :, :-1], qkv[:, :, -1]
        rotated = torch.addcmul(qk * cos, qk.roll(self.width // 2, dims=-1), signed_sin)
        query = rotated[:, :, :-1].flatten(1, 2)
        return cache.decode(layer.number, query, rotated[:, :, -1], value, positions, self.scale).flatten(1)

    def _reduced(self, partial: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial
