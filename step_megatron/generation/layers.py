"""The decoder's layers in generation, without what a training layer carries along.

At one token a row, Megatron's layers spend most of their time outside of matrix products (about 100 module calls and autograd
functions a step for four layers). This runs the same parameters through the same maths in some seven calls a layer, prompts and
decoding steps alike. Layers that are not the plain Qwen2 or LLaMA ones (see `can_run`) are run by Megatron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from step_kernels import rms_norm, skinny_linear, skinny_linear_add_, swiglu

from step_megatron.generation.cache import Pass, Rotary
from step_megatron.model.attention import PackedCausalAttention
from step_megatron.model.canonical import canonical_blocks
from step_megatron.model.lora import Adapted, Linear, local_product

Product = Callable[[torch.Tensor], torch.Tensor]


def can_run(language_model: GPTModel) -> bool:
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
        isinstance(layer.self_attention.core_attention, PackedCausalAttention)
        and all(isinstance(each, ColumnParallelLinear) for each in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1))
        and all(isinstance(each, RowParallelLinear) for each in (layer.self_attention.linear_proj, layer.mlp.linear_fc2))
        for layer in language_model.decoder.layers
    )


def block_product(block: int) -> Linear:
    """`F.linear` on blocks of exactly `block` rows: a row's bits do not depend on how many others there are (`canonical.py`)."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        for rows, piece in canonical_blocks(x, block):
            out[rows] = F.linear(piece, weight, bias)[: rows.stop - rows.start]
        return out

    return product


@dataclass(frozen=True)
class _Layer:
    """What one layer does, but for attention."""

    qkv: Product  # of normed hidden states
    add_out: Callable[[torch.Tensor, torch.Tensor], object]  # to the hidden states
    gate_up: Product
    add_down: Callable[[torch.Tensor, torch.Tensor], object]


class LeanLayers:
    """Runs tokens through the layers of a `GPTModel` for which `can_run` holds.

    The parameters are not copied: what is trained between two passes is used.

    Args:
        language_model: the whole decoder of this tensor-parallel rank.
        linear: what multiplies with a weight.
    """

    def __init__(self, language_model: GPTModel, linear: Linear = skinny_linear):
        config = language_model.config
        self.group = language_model.tp_group if config.tensor_model_parallel_size > 1 else None
        self.groups = config.num_query_groups // config.tensor_model_parallel_size
        self.heads = config.num_attention_heads // config.num_query_groups + 2
        self.width, self.eps = config.kv_channels, config.layernorm_epsilon
        self.final_norm = language_model.decoder.final_layernorm.weight
        self.layers = [
            _Layer(
                self._normed(layer.input_layernorm.weight, layer.self_attention.linear_qkv, linear),
                self._added(layer.self_attention.linear_proj, linear),
                self._normed(layer.pre_mlp_layernorm.weight, layer.mlp.linear_fc1, linear),
                self._added(layer.mlp.linear_fc2, linear),
            )
            for layer in language_model.decoder.layers
        ]
        self.scale = language_model.decoder.layers[0].self_attention.core_attention.softmax_scale

    def __call__(self, hidden: torch.Tensor, work: Pass, rotary: Rotary) -> torch.Tensor:
        """Final hidden states `[T, width]` of tokens whose embeddings `[T, width]` are given, and overwritten."""
        for number in range(len(self.layers)):
            self._run(number, hidden, work, rotary)
        return rms_norm(hidden, self.final_norm, self.eps)

    def read(self, hidden: torch.Tensor, work: Pass, rotary: Rotary) -> None:
        """Only bring keys and values into the cache: nothing of the last layer is computed beyond its own."""
        last = len(self.layers) - 1
        for number in range(last):
            self._run(number, hidden, work, rotary)
        work.rotate_and_store(last, self._split(self.layers[last].qkv(hidden)), rotary)

    def _run(self, number: int, hidden: torch.Tensor, work: Pass, rotary: Rotary) -> None:
        layer = self.layers[number]
        qkv = self._split(layer.qkv(hidden))
        layer.add_out(hidden, work.rotate_and_attend(number, qkv, rotary, self.scale).flatten(1))
        layer.add_down(hidden, swiglu(layer.gate_up(hidden)))

    def _split(self, qkv: torch.Tensor) -> torch.Tensor:
        return qkv.view(-1, self.groups, self.heads, self.width)

    def _normed(self, norm: torch.Tensor, layer: torch.nn.Module, linear: Linear) -> Product:
        """The norm and the linear layer after it, in one call where the layer is a plain one."""
        if linear is skinny_linear and not isinstance(layer, Adapted):
            return partial(skinny_linear, weight=layer.weight, bias=layer.bias, norm=norm, eps=self.eps)
        product = local_product(layer, linear)
        return lambda hidden: product(rms_norm(hidden, norm, self.eps))

    def _added(self, layer: torch.nn.Module, linear: Linear) -> Callable[[torch.Tensor, torch.Tensor], object]:
        """The linear layer and its sum with the hidden states."""
        if linear is skinny_linear and self.group is None and not isinstance(layer, Adapted):
            return partial(skinny_linear_add_, weight=layer.weight)
        product = local_product(layer, linear)
        return lambda hidden, x: hidden.add_(self._reduced(product(x)))

    def _reduced(self, partial_sum: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(partial_sum, group=self.group)
        return partial_sum
