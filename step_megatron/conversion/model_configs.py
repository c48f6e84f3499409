"""`config.json` and `generation_config.json` of an exported model: our settings in the words of each layout.

Where the model was imported in the layout that it is exported to, what its own configuration says besides stays as it was.
"""

from typing import Any

from step_megatron.config.schema import Config
from step_megatron.conversion.provenance import History
from step_megatron.data.template import TEMPLATES
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.model.decoder import transformer_config

_ARCHITECTURES = {
    "step-audio": "StepAudio2ForCausalLM",
    "qwen2-audio": "Qwen2AudioForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_TYPES = {"step-audio": "step_audio_2", "qwen2-audio": "qwen2_audio", "qwen2": "qwen2", "llama": "llama"}


def build(config: Config, layout: str, past: History) -> dict[str, Any]:
    """The tree of `config.json`, but for `dtype`."""
    before = past.config if past.layout == layout else {}
    tree: dict[str, Any] = {"architectures": [_ARCHITECTURES[layout]], "model_type": _TYPES[layout], **before}
    for name in ("torch_dtype", "transformers_version"):
        tree.pop(name, None)
    if layout in ("qwen2", "llama"):
        return tree | _decoder(config, layout, tree)
    if layout == "qwen2-audio":
        text = before.get("text_config", {})
        tree["text_config"] = {"model_type": "qwen2", **text, **_decoder(config, "qwen2", text)}
        tree["text_config"].pop("torch_dtype", None)
        tree["audio_config"] = {"model_type": "qwen2_audio_encoder", **before.get("audio_config", {}), **_whisper(config)}
        tree["tie_word_embeddings"] = config.model.tie_embeddings
        return tree
    text = _decoder(config, "qwen2", {}) | {"num_attention_groups": config.megatron.transformer.get("num_query_groups")}
    if "audio_encoder_config" in before and "text_config" not in before:
        # The original layout: the decoder's sizes beside the encoder's.
        tree |= text
    else:
        tree["text_config"] = {"model_type": "qwen2", **before.get("text_config", {}), **text}
    encoder = config.encoder
    tree["audio_encoder_config"] = before.get("audio_encoder_config", {}) | {
        "n_mels": encoder.mels,
        "n_audio_ctx": encoder.max_positions,
        "n_audio_state": encoder.width,
        "n_audio_head": encoder.heads,
        "n_audio_layer": encoder.layers,
        "llm_dim": config.megatron.transformer["hidden_size"],
        "kernel_size": 3,
        "adapter_stride": 2,
    }
    return tree


def _decoder(config: Config, layout: str, before: dict[str, Any]) -> dict[str, Any]:
    sizes, model = transformer_config(config), config.model
    said: dict[str, Any] = {
        "vocab_size": model.vocabulary_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.ffn_hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_query_groups,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": sizes.layernorm_epsilon,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        # What transformers 5 writes, and what everything older reads.
        "rope_parameters": {**before.get("rope_parameters", {}), "rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,
    }
    if sizes.kv_channels * sizes.num_attention_heads != sizes.hidden_size or "head_dim" in before:
        said["head_dim"] = sizes.kv_channels
    return said | ({"attention_bias": False, "mlp_bias": False} if layout == "llama" else {"use_sliding_window": False})


def _whisper(config: Config) -> dict[str, Any]:
    encoder = config.encoder
    return {
        "num_mel_bins": encoder.mels,
        "d_model": encoder.width,
        "encoder_layers": encoder.layers,
        "encoder_attention_heads": encoder.heads,
        "encoder_ffn_dim": encoder.ffn_width,
        "max_source_positions": encoder.max_positions,
    }


def generation(config: Config, past: History, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The tree of `generation_config.json`: the imported one, with the ends of a reply that the run was trained on."""
    tree = dict(past.generation or {})
    tree.pop("transformers_version", None)
    if tokenizer is not None:
        close = tokenizer.special(TEMPLATES[config.tokenizer.template].close)
        ends = tree.get("eos_token_id", [])
        ends = ends if isinstance(ends, list) else [ends]
        tree["eos_token_id"] = list(dict.fromkeys([*ends, close, tokenizer.pad_id]))
        tree.setdefault("pad_token_id", tokenizer.pad_id)
    return tree
