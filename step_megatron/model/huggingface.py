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
from step_megatron.model.mapping import Entry, problems

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def decoder_entries(config: TransformerConfig, vocabulary: int, tied: bool) -> list[Entry]:
    """How every parameter of a `GPTModel` is made of Hugging Face's, in the order of the layers.

    Args:
        config: gives layers, widths, heads and groups.
        vocabulary: rows of the embeddings.
        tied: the output layer is the embedding, and has no tensor of its own.
    """
    width, inner = config.hidden_size, config.ffn_hidden_size
    queries, keys = config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels
    entries = [Entry(EMBEDDING, (("model.embed_tokens.weight", (vocabulary, width)),))]
    for layer in range(config.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        entries.append(Entry(f"{ours}input_layernorm.weight", ((f"{theirs}input_layernorm.weight", (width,)),)))
        for part, columns in (("weight", (width,)), ("bias", ())) if config.add_qkv_bias else (("weight", (width,)),):
            rows = (("q", queries), ("k", keys), ("v", keys))
            parts = tuple((f"{theirs}self_attn.{letter}_proj.{part}", (count, *columns)) for letter, count in rows)
            entries.append(Entry(f"{ours}self_attention.linear_qkv.{part}", parts, groups=config.num_query_groups))
        entries.append(
            Entry(f"{ours}self_attention.linear_proj.weight", ((f"{theirs}self_attn.o_proj.weight", (width, queries)),))
        )
        entries.append(Entry(f"{ours}pre_mlp_layernorm.weight", ((f"{theirs}post_attention_layernorm.weight", (width,)),)))
        halves = tuple((f"{theirs}mlp.{half}_proj.weight", (inner, width)) for half in ("gate", "up"))
        entries.append(Entry(f"{ours}mlp.linear_fc1.weight", halves))
        entries.append(Entry(f"{ours}mlp.linear_fc2.weight", ((f"{theirs}mlp.down_proj.weight", (width, inner)),)))
    entries.append(Entry("decoder.final_layernorm.weight", (("model.norm.weight", (width,)),)))
    if not tied:
        entries.append(Entry(OUTPUT, (("lm_head.weight", (vocabulary, width)),)))
    return entries


def from_huggingface(state: Mapping[str, torch.Tensor], config: TransformerConfig, tied: bool) -> dict[str, torch.Tensor]:
    """Full parameters of a `GPTModel` (see `weights`) from a Hugging Face state dict; tensors beside the parameters are let be.

    Args:
        state: tensors of `Qwen2ForCausalLM` or `LlamaForCausalLM`, at least the parameters.
        config, tied: as of `decoder_entries`.

    Raises:
        ValueError: tensors that the model needs and `state` lacks, or that do not have the configuration's shape; names them all.
    """
    embedding = state.get("model.embed_tokens.weight")
    entries = decoder_entries(config, 0 if embedding is None else embedding.shape[0], tied)
    if found := problems(entries, {name: tuple(tensor.shape) for name, tensor in state.items()}, lambda name: True):
        raise ValueError("not this model:\n" + "\n".join(found))
    return {entry.ours: entry.join([state[name] for name, _ in entry.theirs]) for entry in entries}


def to_huggingface(full: Mapping[str, torch.Tensor], config: TransformerConfig, tied: bool) -> dict[str, torch.Tensor]:
    """A Hugging Face state dict from full parameters (or their gradients); the inverse of `from_huggingface`.

    With tied embeddings there is no `lm_head.weight`.
    """
    state = {}
    for entry in decoder_entries(config, full[EMBEDDING].shape[0], tied):
        parts = entry.split(full[entry.ours])
        state.update({name: part for (name, _), part in zip(entry.theirs, parts, strict=True)})
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
