"""Small foreign checkpoints, written by transformers or by the released layout's names, and what a test asks of them."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

TEXT = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    initializer_range=0.05,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
AUDIO = dict(
    num_mel_bins=16, d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=80, max_source_positions=40
)
AUDIO_TOKEN = 130
ROPE = {"rope_type": "default", "rope_theta": 5e4}


def randomised(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Norms and biases random too, so that a swapped tensor shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.7 * noise * parameter[0].numel() ** -0.5)
    return model.to(dtype).eval()


def text_model(folder: Path, kind: str, tied: bool = False, dtype: torch.dtype = torch.float32, **sizes) -> torch.nn.Module:
    """A `Qwen2ForCausalLM` or `LlamaForCausalLM`, saved in several shards; returns it."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config, cls = (Qwen2Config, Qwen2ForCausalLM) if kind == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    model = cls(config(**TEXT | sizes, rope_parameters=ROPE, tie_word_embeddings=tied))
    model = randomised(model, dtype)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def qwen2_audio(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **AUDIO},
        text_config={"model_type": "qwen2", **TEXT, "rope_parameters": ROPE},
        audio_token_index=AUDIO_TOKEN,
    )
    model = randomised(Qwen2AudioForConditionalGeneration(config), dtype)
    model.save_pretrained(folder, max_shard_size="150KB")
    return model


def whisper(folder: Path) -> torch.nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=60, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=0)
    model = WhisperForConditionalGeneration(WhisperConfig(**AUDIO, **sizes, eos_token_id=0, decoder_start_token_id=0))
    model = randomised(model, torch.float32)
    model.save_pretrained(folder)
    return model


def step_audio_tree(**text) -> dict:
    """`config.json` as released (the Hugging Face wrapper)."""
    sizes = {name: value for name, value in TEXT.items() if not name.endswith("token_id")} | {"num_attention_groups": 2} | text
    audio = {"n_mels": 16, "n_audio_ctx": 40, "n_audio_state": 48, "n_audio_head": 4, "n_audio_layer": 2, "kernel_size": 3}
    return {
        "architectures": ["StepAudio2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_step_audio_2.StepAudio2ForCausalLM"},
        "model_type": "step_audio_2",
        "audio_encoder_config": audio | {"llm_dim": sizes["hidden_size"], "adapter_stride": 2},
        "text_config": sizes | {"model_type": "qwen2", "rope_theta": 5e4},
    }


def step_audio_shapes(tree: dict, inner: int = 32, ffn: int = 192) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout, written out from its description."""
    text, audio = tree["text_config"], tree["audio_encoder_config"]
    vocabulary, width, hidden = text["vocab_size"], text["hidden_size"], text["intermediate_size"]
    keys = width // text["num_attention_heads"] * text["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(text["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes |= {f"{at}.self_attn.{name}_proj.weight": (rows, width), f"{at}.self_attn.{name}_proj.bias": (rows,)}
        shapes[f"{at}.self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{at}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{at}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    d = audio["n_audio_state"]
    shapes |= {"encoder.conv1.weight": (d, audio["n_mels"], 3), "encoder.conv1.bias": (d,)}
    shapes |= {"encoder.conv2.weight": (d, d, 3), "encoder.conv2.bias": (d,)}
    shapes["encoder.positional_embedding.weight"] = (audio["n_audio_ctx"], d)
    for layer in range(audio["n_audio_layer"]):
        at = f"encoder.blocks.{layer}"
        for name in ("query", "key", "value", "out"):
            shapes[f"{at}.attn.{name}.weight"] = (d, d)
            shapes |= {} if name == "key" else {f"{at}.attn.{name}.bias": (d,)}
        shapes |= {f"{at}.mlp.0.weight": (ffn, d), f"{at}.mlp.0.bias": (ffn,)}
        shapes |= {f"{at}.mlp.2.weight": (d, ffn), f"{at}.mlp.2.bias": (d,)}
        shapes |= {f"{at}.{name}_ln.{part}": (d,) for name in ("attn", "mlp") for part in ("weight", "bias")}
    shapes |= {"encoder.after_norm.weight": (d,), "encoder.after_norm.bias": (d,)}
    shapes |= {"adapter.conv.weight": (d, d, 3), "adapter.conv.bias": (d,)}
    shapes |= {"adapter.linear1.weight": (inner, d), "adapter.linear1.bias": (inner,)}
    return shapes | {"adapter.linear2.weight": (width, inner), "adapter.linear2.bias": (width,)}


def step_audio(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A random checkpoint in the released layout, in two files without an index, the encoder in float32."""
    generator = torch.Generator().manual_seed(2)
    tree = step_audio_tree()
    folder.mkdir(parents=True)
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in step_audio_shapes(tree).items()}
    state = {name: tensor if name.startswith("encoder.") else tensor.to(dtype) for name, tensor in state.items()}
    (folder / "config.json").write_text(json.dumps(tree | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    names = list(state)
    save_file({name: state[name] for name in names[::2]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "b.safetensors")
    return state


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}
    return found


def same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def loaded(run_dir: Path, transformer: dict | None = None):
    """The model of an imported run, in the layout of the processes that call this."""
    from step_megatron.checkpoint.directory import latest_checkpoint
    from step_megatron.checkpoint.distributed import load_model_weights
    from step_megatron.config import load_config
    from step_megatron.model.audio_lm import build_model
    from step_megatron.runtime.device import initialize

    config = load_config(run_dir / "config.yaml")
    config.run.threads = 1
    config.megatron.transformer |= transformer or {}
    initialize(config)
    chunks = build_model(config)
    load_model_weights(chunks, latest_checkpoint(run_dir))
    return config, [chunk.eval() for chunk in chunks]
