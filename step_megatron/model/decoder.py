"""The Qwen2.5 decoder as a Megatron `GPTModel`: configuration, construction of one pipeline stage, weights at the start."""

import dataclasses
import difflib
import enum
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from step_megatron.config.schema import Config
from step_megatron.model import lora, weights
from step_megatron.model.layers import GatedMLP, layer_kind, layer_specification
from step_megatron.runtime import megatron_release

# What makes it Qwen2.5 (and, without the bias of query, key and value, LLaMA): no field of a preset.
_QWEN2 = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # Weights are drawn per parameter, the same in every layout (`weights.initialize`), or loaded.
    "perform_initialization": False,
}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's `TransformerConfig` from `config.megatron.transformer`.

    Values may be written as in YAML: `params_dtype: bfloat16`, an enumeration by its member's name. `bf16: true` also sets the
    type of parameters and pipeline messages.

    Raises:
        ValueError: a field that Megatron does not have (names the nearest), a value that cannot be one of its field's type,
            dropout (not reproducible across layouts), or what Megatron itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig)}
    settings: dict[str, Any] = {}
    for name, value in config.megatron.transformer.items():
        if name not in fields:
            near = difflib.get_close_matches(name, list(fields), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"megatron.transformer.{name}: Megatron-Core's TransformerConfig has no such field{hint}")
        settings[name] = _value(name, fields[name].type, value)
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if not settings.get(name):
            raise ValueError(f"megatron.transformer.{name} is not set: choose a model.preset or set it")
    dtype = torch.bfloat16 if settings.get("bf16") else torch.float16 if settings.get("fp16") else torch.float32
    on_cpu = not torch.cuda.is_available()
    defaults = _QWEN2 | {"params_dtype": dtype, "pipeline_dtype": settings.get("params_dtype", dtype)}
    settings = defaults | megatron_release.transformer_defaults(settings, on_cpu)
    for name in ("hidden_dropout", "attention_dropout"):
        if settings[name]:
            raise ValueError(f"megatron.transformer.{name}={settings[name]}: dropout is not supported; set it to 0")
    megatron_release.check_recomputation(settings)
    megatron_release.check_interleaving(settings)
    heads, groups = settings["num_attention_heads"], settings.get("num_query_groups") or settings["num_attention_heads"]
    if heads % groups:
        raise ValueError(f"megatron.transformer.num_query_groups={groups} does not divide num_attention_heads={heads}")
    try:
        return TransformerConfig(**settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"megatron.transformer: Megatron-Core refuses this configuration: {error}") from error


def build_decoder(config: Config, transformer: TransformerConfig, vp_stage: int | None = None) -> GPTModel:
    """One pipeline stage (or virtual chunk) of the decoder, weights not yet set.

    Positions are `none` for Megatron: the attention rotates by the positions of the packed segments. The vocabulary is padded to
    what the tensor-parallel ranks share evenly; the rows of padding are zero, and no token (`OutputLayer`).

    Raises:
        ValueError: more tensor-parallel ranks than the vocabulary has rows for; settings of LoRA that make no adapter.
    """
    vocabulary, ranks = config.model.vocabulary_size, transformer.tensor_model_parallel_size
    padded = weights.padded_vocabulary(vocabulary, ranks)
    if padded - vocabulary >= padded // ranks:
        raise ValueError(f"model.vocabulary_size={vocabulary} leaves nothing to the last of tensor_model_parallel_size={ranks}")
    lora.check(config.model.lora)
    kind = layer_kind(config.model.layers, adapted=config.model.lora.rank > 0)
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=layer_specification(transformer, kind, vp_stage, config.model.lora),
        vocab_size=padded,
        max_sequence_length=config.model.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
        position_embedding_type="none",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        # The embeddings stay whole until audio is merged into them; `AudioLanguageModel` scatters.
        scatter_embedding_sequence_parallel=False,
        parallel_output=True,
        vp_stage=vp_stage,
    )
    GatedMLP.adopt(model)
    return model


def _value(name: str, kind: Any, value: Any) -> Any:
    """A YAML value as Megatron's field wants it: dtypes and enumerations by name."""
    if not isinstance(value, str):
        return value
    options = getattr(kind, "__args__", (kind,))
    if torch.dtype in options:
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"megatron.transformer.{name}={value!r}: not a torch dtype; write bfloat16, float16 or float32")
        return dtype
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if value not in kind.__members__:
            raise ValueError(f"megatron.transformer.{name}={value!r}: must be one of {', '.join(kind.__members__)}")
        return kind[value]
    return value
