"""The checkpoint layouts of others: how each is recognised, what its tensors are called, and its configuration beside ours.

    layout        decoder             adaptor                  encoder
    step-audio    model.* lm_head     adapter.*                encoder.*, released names       Step-Audio 2, Step-Audio R1
    qwen2-audio   language_model.*    multi_modal_projector.*  audio_tower.*, Hugging Face's   Qwen2-Audio
    qwen2, llama  model.* lm_head     -                        -                               Qwen2.5; LLaMA, SmolLM2 (GGUF too)
    whisper       -                   -                        Hugging Face's, or CTranslate2  its decoder is not used

Configurations are read without transformers; a setting that our decoder does not have is an error that names it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from step_megatron.checkpoint.safetensors_files import SafetensorsFiles
from step_megatron.config.schema import AdaptorConfig, EncoderConfig
from step_megatron.conversion.gguf_file import GgufFile
from step_megatron.conversion.sources import ConversionError, CTranslate2Encoder, Source
from step_megatron.model.whisper import encoder_prefix, huggingface_name

Layout = Literal["step-audio", "qwen2-audio", "qwen2", "llama", "whisper"]
Rename = Callable[[str], str]
STEP_AUDIO_TYPES = ("step_audio_2", "step_audio_qwen2")
_TYPES: dict[str, Layout] = {
    **dict.fromkeys(STEP_AUDIO_TYPES, "step-audio"),
    "qwen2_audio": "qwen2-audio",
    "qwen2": "qwen2",
    "llama": "llama",
    "whisper": "whisper",
}


# What a configuration leaves out has its class's default (transformers writes the differences only).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
    "qwen2-audio": {
        "num_mel_bins": 128,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "max_source_positions": 1500,
    },
    "step-audio": {"rope_theta": 1e6},
}


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, as `config.model` and `config.megatron.transformer` have them."""

    model: dict[str, Any]
    transformer: dict[str, Any]


@dataclass
class Foreign:
    """A checkpoint that was recognised; nothing of it has been read but configuration and headers.

    Attributes:
        tree: its `config.json`, or what another file says in its terms.
        decoder, encoder, adaptor: the parts' sizes; None for a part that it does not have.
        decoder_name, encoder_name: its names of tensors that Hugging Face's decoders, and the released encoder, call so.
        adaptor_prefix: what the adaptor's tensors begin with.
    """

    layout: Layout
    directory: Path
    source: Source
    tree: dict[str, Any]
    decoder: Decoder | None = None
    encoder: EncoderConfig | None = None
    adaptor: AdaptorConfig | None = None
    decoder_name: Rename = field(default=lambda name: name)
    encoder_name: Rename = field(default=lambda name: name)
    adaptor_prefix: str = ""

    def ignored(self, name: str) -> bool:
        """Whether a tensor is known and of no use here: it can be computed, or belongs to a part that is not imported."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        if self.decoder and self.decoder.model["tie_embeddings"]:
            # Old files hold the tied weight twice; `importing` compares the copies.
            return name == self.decoder_name("lm_head.weight")
        return self.layout == "whisper" and name.startswith(("model.decoder.", "decoder.", "proj_out."))


def recognise(path: Path) -> Foreign:
    """Find out what a directory (or a GGUF file) holds.

    Raises:
        ConversionError: nothing that is known, or a setting that our model does not have; SafetensorsError: damaged files.
    """
    if path.suffix == ".gguf" or (path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))):
        return _gguf(path)
    if not path.is_dir():
        raise ConversionError(f"{path}: no such folder; give the one that holds config.json and the weights, or a .gguf file")
    if (path / "model.bin").is_file():
        return _ctranslate2(path)
    tree = _read_json(path / "config.json")
    layout = _TYPES.get(tree.get("model_type", ""))
    if layout is None:
        raise ConversionError(
            f"{path / 'config.json'}: model_type is {tree.get('model_type')!r}; known are {', '.join(_TYPES)}, and GGUF files"
        )
    foreign = Foreign(layout, path, SafetensorsFiles(path), tree)
    try:
        _describe(foreign)
    except KeyError as error:
        raise ConversionError(f"{path / 'config.json'}: {error.args[0]} is missing; fetch the model's own config.json") from None
    return foreign


def _describe(foreign: Foreign) -> None:
    """Fill in the parts that the layout has."""
    tree, where = foreign.tree, foreign.directory / "config.json"
    if foreign.layout in ("qwen2", "llama"):
        foreign.decoder = decoder_sizes(tree, foreign.layout, where)
    elif foreign.layout == "whisper":
        foreign.encoder = _whisper_sizes(tree)
        prefix = encoder_prefix(foreign.source.tensors)
        if prefix is None:
            raise ConversionError(f"{foreign.directory}: no tensor is called [prefix]conv1.weight; is it a Whisper model?")
        foreign.encoder_name = lambda name: prefix + huggingface_name(name)
    elif foreign.layout == "qwen2-audio":
        text = tree["text_config"]
        foreign.decoder = decoder_sizes(text, _TYPES.get(text.get("model_type", "qwen2"), "qwen2"), where)
        foreign.decoder_name = lambda name: f"language_model.{name}"
        foreign.encoder = _whisper_sizes(_DEFAULTS["qwen2-audio"] | tree["audio_config"])
        foreign.encoder_name = lambda name: f"audio_tower.{huggingface_name(name)}"
        foreign.adaptor, foreign.adaptor_prefix = AdaptorConfig(kind="linear"), "multi_modal_projector."
    else:
        foreign.decoder = decoder_sizes({**tree, **tree.get("text_config", {})}, "step-audio", where)
        foreign.encoder, foreign.adaptor = _step_audio_sizes(foreign)
        foreign.encoder_name, foreign.adaptor_prefix = (lambda name: f"encoder.{name}"), "adapter."


def decoder_sizes(tree: dict[str, Any], layout: str, where: Path) -> Decoder:
    """Sizes from a configuration of Qwen2, LLaMA or Step-Audio's decoder, which is Qwen2's.

    Raises:
        ConversionError: a setting that our decoder does not have.
    """
    tree = _DEFAULTS[layout] | tree
    rope = tree.get("rope_parameters") or {}
    scaling = tree.get("rope_scaling") or ({} if rope.get("rope_type", "default") == "default" else rope)
    unsupported = {
        "rope_scaling": scaling,
        "use_sliding_window": tree.get("use_sliding_window"),
        "attention_bias": layout == "llama" and tree.get("attention_bias"),
        "mlp_bias": tree.get("mlp_bias"),
        "rope_interleaved": tree.get("rope_interleaved"),
        "hidden_act": tree.get("hidden_act", "silu") != "silu" and tree["hidden_act"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0 and rope["partial_rotary_factor"],
    }
    if used := {name: value for name, value in unsupported.items() if value}:
        said = ", ".join(f"{name}={value!r}" for name, value in used.items())
        raise ConversionError(f"{where}: {said}: our decoder does not have that; import another model")
    heads, width = tree["num_attention_heads"], tree["hidden_size"]
    model = {
        "vocabulary_size": tree["vocab_size"],
        "max_positions": tree["max_position_embeddings"],
        "rotary_base": float(rope.get("rope_theta") or tree["rope_theta"]),
        "tie_embeddings": bool(tree.get("tie_word_embeddings", False)),
    }
    transformer = {
        "num_layers": tree["num_hidden_layers"],
        "hidden_size": width,
        "ffn_hidden_size": tree["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": tree.get("num_key_value_heads") or tree.get("num_attention_groups") or heads,
        "kv_channels": tree.get("head_dim") or width // heads,
        "layernorm_epsilon": float(tree["rms_norm_eps"]),
        "add_qkv_bias": layout != "llama",
    }
    return Decoder(model, transformer)


def _whisper_sizes(tree: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig(
        mels=tree["num_mel_bins"],
        width=tree["d_model"],
        layers=tree["encoder_layers"],
        heads=tree["encoder_attention_heads"],
        ffn_width=tree["encoder_ffn_dim"],
        max_positions=tree["max_source_positions"],
    )


def _step_audio_sizes(foreign: Foreign) -> tuple[EncoderConfig, AdaptorConfig]:
    """The released configuration does not say how wide the inner layers are: the tensors do."""
    audio = foreign.tree["audio_encoder_config"]
    kernel, stride = audio.get("kernel_size", 3), audio.get("adapter_stride", 2)
    if (kernel, stride) != (3, 2):
        raise ConversionError(
            f"{foreign.directory / 'config.json'}: kernel_size={kernel}, adapter_stride={stride}; our adaptor has 3 and 2"
        )

    def rows(name: str, otherwise: int) -> int:
        info = foreign.source.tensors.get(name)
        return info.shape[0] if info else otherwise

    width = audio["n_audio_state"]
    encoder = EncoderConfig(
        mels=audio["n_mels"],
        width=width,
        layers=audio["n_audio_layer"],
        heads=audio["n_audio_head"],
        ffn_width=rows("encoder.blocks.0.mlp.0.weight", 4 * width),
        max_positions=rows("encoder.positional_embedding.weight", audio["n_audio_ctx"]),
    )
    return encoder, AdaptorConfig(kind="step", width=rows("adapter.linear1.weight", AdaptorConfig.width))


def _gguf(path: Path) -> Foreign:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ConversionError(f"{path}: {len(files)} GGUF files; name one of them")
    source = GgufFile(files[0])
    tree = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": source.tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": source.setting("embedding_length"),
        "intermediate_size": source.setting("feed_forward_length"),
        "num_hidden_layers": source.setting("block_count"),
        "num_attention_heads": source.setting("attention.head_count"),
        "num_key_value_heads": source.setting("attention.head_count_kv"),
        "max_position_embeddings": source.setting("context_length"),
        # Stored in single precision: seven digits give back the decimal number that was meant.
        "rms_norm_eps": float(f"{source.setting('attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": source.setting("rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in source.tensors,
    }
    return Foreign("llama", files[0].parent, source, tree, decoder_sizes(tree, "llama", files[0]))


def _ctranslate2(path: Path) -> Foreign:
    source = CTranslate2Encoder(path / "model.bin")
    shapes = {name: info.shape for name, info in source.tensors.items()}
    encoder = EncoderConfig(
        mels=shapes["conv1.weight"][1],
        width=shapes["conv1.weight"][0],
        layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        heads=source.heads,
        ffn_width=shapes["blocks.0.mlp.0.weight"][0],
        max_positions=shapes["positional_embedding.weight"][0],
    )
    return Foreign("whisper", path, source, {"model_type": "whisper"}, encoder=encoder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}; give a folder with config.json, model.bin or one .gguf file") from error
    except ValueError as error:
        raise ConversionError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise ConversionError(f"{path}: not an object; fetch it again")
    return tree
