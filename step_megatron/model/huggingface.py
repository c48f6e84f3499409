"""The decoder's weights under Hugging Face's names: `Qwen2ForCausalLM`, `LlamaForCausalLM` and the released Step-Audio layout.

Here, query, key and value are one matrix, ordered by key-value group (`q..q k v` for each group, so that a tensor-parallel shard
holds whole groups), and gate and up are one matrix, gate first. Everything else only changes its name.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from step_megatron.model import weights

# Ours -> theirs, outside and inside of layers.
_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_INNER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def from_huggingface(state: Mapping[str, torch.Tensor], config: TransformerConfig, tied: bool) -> dict[str, torch.Tensor]:
    """Full parameters of a `GPTModel` (see `weights`) from a Hugging Face state dict.

    Args:
        state: tensors of `Qwen2ForCausalLM` or `LlamaForCausalLM`, at least the parameters.
        config: gives layers, heads and groups.
        tied: the output layer is the embedding, and has no tensor of its own.

    Raises:
        KeyError: a tensor that the model needs and `state` lacks.
        ValueError: a tensor that does not have the configuration's shape.
    """
    full = {ours: _take(state, theirs) for ours, theirs in _OUTER.items() if not (tied and ours == "output_layer.weight")}
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, other in _INNER.items():
            full[ours + name] = _take(state, theirs + other)
        full[ours + "mlp.linear_fc1.weight"] = torch.cat(
            [_take(state, f"{theirs}mlp.{half}_proj.weight") for half in ("gate", "up")]
        )
        for part in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            q, k, v = (_take(state, f"{theirs}self_attn.{letter}_proj.{part}") for letter in "qkv")
            full[f"{ours}self_attention.linear_qkv.{part}"] = _join_qkv(f"{theirs}self_attn", q, k, v, config)
    return full


def to_huggingface(full: Mapping[str, torch.Tensor], config: TransformerConfig, tied: bool) -> dict[str, torch.Tensor]:
    """A Hugging Face state dict from full parameters (or their gradients); the inverse of `from_huggingface`.

    With tied embeddings there is no `lm_head.weight`.
    """
    state = {theirs: _take(full, ours) for ours, theirs in _OUTER.items() if not (tied and ours == "output_layer.weight")}
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, other in _INNER.items():
            state[theirs + other] = _take(full, ours + name)
        gate, up = _take(full, ours + "mlp.linear_fc1.weight").chunk(2)
        state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"] = gate, up
        for part in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            parts = _split_qkv(_take(full, f"{ours}self_attention.linear_qkv.{part}"), config)
            state.update({f"{theirs}self_attn.{letter}_proj.{part}": tensor for letter, tensor in zip("qkv", parts, strict=True)})
    return state


def gather(model_chunks: Iterable[torch.nn.Module], attribute: str | None = None) -> dict[str, torch.Tensor]:
    """Full tensors of all parameters, on every rank of a replica; for tests and small exports, since everything is in memory.

    Args:
        model_chunks: this rank's chunks of an `AudioLanguageModel` or `GPTModel`, not wrapped.
        attribute: `grad` or `main_grad` for gradients (parameters that have none are left out), None for the values.

    Returns:
        CPU tensors by full name, merged over tensor- and pipeline-parallel ranks.
    """
    mine: dict[str, torch.Tensor] = {}
    for chunk in model_chunks:
        names = weights.full_names(chunk)
        for local, parameter in chunk.named_parameters():
            tensor = parameter if attribute is None else getattr(parameter, attribute, None)
            if tensor is not None:
                mine[names[local]] = tensor.detach().cpu().clone()
    group = parallel_state.get_model_parallel_group()
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, (parallel_state.get_tensor_model_parallel_rank(), mine), group=group)
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for rank, tensors in gathered:
        for name, tensor in tensors.items():
            shards.setdefault(name, {})[rank] = tensor
    return {name: weights.merge(name, [parts[rank] for rank in sorted(parts)]) for name, parts in shards.items()}


def _take(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state:
        raise KeyError(f"no tensor {name} among the {len(state)} given: is it another model, or another number of layers?")
    return state[name]


def _join_qkv(where: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    groups, width = config.num_query_groups, config.kv_channels
    heads = config.num_attention_heads
    for letter, tensor, rows in (("q", q, heads * width), ("k", k, groups * width), ("v", v, groups * width)):
        if tensor.shape[0] != rows:
            raise ValueError(f"{where}.{letter}_proj has {tensor.shape[0]} rows, the configuration wants {rows}")
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in (q, k, v)], dim=1).flatten(0, 1)


def _split_qkv(joined: torch.Tensor, config: TransformerConfig) -> tuple[torch.Tensor, ...]:
    per_group = config.num_attention_heads // config.num_query_groups * config.kv_channels
    sizes = [per_group, config.kv_channels, config.kv_channels]
    parts = joined.unflatten(0, (config.num_query_groups, -1)).split(sizes, dim=1)
    return tuple(part.flatten(0, 1) for part in parts)
