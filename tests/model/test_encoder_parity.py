"""AudioEncoder equals transformers' Qwen2AudioEncoder and WhisperEncoder on the same weights, at ragged lengths."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioEncoderConfig, WhisperConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder
from step_megatron.model.whisper import from_huggingface

SMALL = EncoderConfig(mels=16, width=48, layers=3, heads=4, ffn_width=96)
WHISPER_BASE = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048, pooling=False)
# Every class of length modulo four at 50 Hz, the smallest, above 192 and 768 positions (the kernel's tile sizes), a full chunk.
VALID_MEL_FRAMES = (1, 2, 3, 5, 7, 8, 102, 101, 104, 104, 600, 2500)
# The log-mel of silence under Whisper's floor for a clip with a peak of 0 dB: (-8 + 4) / 4.
SILENCE = -1.0


def log_mels(mels: int, valid: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random frames; the two tail frames differ from silence, as those of a real clip do (its last samples reach into them)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(mels, frames + 2, generator=generator) for frames in valid]


def huggingface_sizes(config: EncoderConfig) -> dict:
    return {
        "num_mel_bins": config.mels,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "attn_implementation": "sdpa",
    }


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of ordinary size everywhere, norms and biases included, so that a swapped tensor cannot hide."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "embed_positions" not in name:
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (parameter.dim() == 1) * 0.5)
    return module.eval()


def qwen2_audio(encoder: Qwen2AudioEncoder, log_mel: torch.Tensor) -> torch.Tensor:
    """Features of one clip as Qwen2AudioModel makes them: padded to 3,000 frames, masked by the processor's feature mask."""
    padded = torch.nn.functional.pad(log_mel, (0, 3000 - log_mel.shape[1]), value=SILENCE)[None]
    positions, features = encoder._get_feat_extract_output_lengths(torch.tensor(log_mel.shape[1] - 2))
    mask = torch.zeros(1, 1, 1500, 1500)
    mask[:, :, :, positions.item() :] = float("-inf")
    return encoder(padded, attention_mask=mask).last_hidden_state[0, : max(0, features.item())]


def test_equals_qwen2_audio_encoder_at_ragged_lengths():
    theirs = randomised(Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**huggingface_sizes(SMALL))))
    ours = AudioEncoder(SMALL, block=128)
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    clips = log_mels(SMALL.mels, VALID_MEL_FRAMES)
    with torch.no_grad():
        for clip, actual in zip(clips, ours.encode(clips), strict=True):
            torch.testing.assert_close(actual, qwen2_audio(theirs, clip), rtol=0, atol=1e-5)


def whisper_encoder(config: EncoderConfig, positions: int) -> WhisperEncoder:
    """transformers' encoder for clips of exactly `positions` positions: it knows neither masks nor other lengths."""
    return WhisperEncoder(WhisperConfig(max_source_positions=positions, **huggingface_sizes(config))).eval()


def assert_equals_whisper(ours: AudioEncoder, state: dict[str, torch.Tensor], positions: tuple[int, ...], atol: float) -> None:
    clips = log_mels(ours.config.mels, tuple(2 * count for count in positions))
    for clip in clips:
        clip[:, -2:] = 0.0  # transformers has no frame there: its convolution pads with zeros
    with torch.no_grad():
        for clip, count, actual in zip(clips, positions, ours.encode(clips), strict=True):
            theirs = whisper_encoder(ours.config, count)
            theirs.load_state_dict(state | {"embed_positions.weight": state["embed_positions.weight"][:count]})
            torch.testing.assert_close(actual, theirs(clip[None, :, :-2]).last_hidden_state[0], rtol=0, atol=atol)


def test_trunk_equals_whisper_encoder_without_pooling():
    config = EncoderConfig(mels=16, width=48, layers=3, heads=4, ffn_width=96, pooling=False)
    theirs = randomised(whisper_encoder(config, 1500))
    ours = AudioEncoder(config, block=128)
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    assert_equals_whisper(ours, theirs.state_dict(), (1, 2, 37, 250, 1500), atol=1e-5)


def whisper_base_for_huggingface(path: Path) -> dict[str, torch.Tensor]:
    """Another reading of the CTranslate2 file, straight into Hugging Face's names."""
    data, offset, tensors = path.read_bytes(), 0, {}

    def take(layout: str) -> tuple:
        nonlocal offset
        values = struct.unpack_from("<" + layout, data, offset)
        offset += struct.calcsize("<" + layout)
        return values

    take("I"), take(f"{take('H')[0]}s"), take("I")
    for _ in range(take("I")[0]):
        name = take(f"{take('H')[0]}s")[0][:-1].decode()
        shape = take(f"{take('B')[0]}I")
        kind, size = take("BI")
        if kind == 4 and name.startswith("encoder/"):
            tensors[name[8:]] = torch.from_numpy(
                np.frombuffer(data, np.float16, size // 2, offset).reshape(shape).astype(np.float32)
            )
        offset += size
    state = {"embed_positions.weight": tensors["position_encodings/encodings"]}
    parts = {"weight": "gamma", "bias": "beta"}
    for part, gamma in parts.items():
        state[f"layer_norm.{part}"] = tensors[f"layer_norm/{gamma}"]
        for conv in ("conv1", "conv2"):
            state[f"{conv}.{part}"] = tensors[f"{conv}/{part}"]
        for layer in range(6):
            source, target = f"layer_{layer}", f"layers.{layer}"
            state[f"{target}.self_attn_layer_norm.{part}"] = tensors[f"{source}/self_attention/layer_norm/{gamma}"]
            state[f"{target}.final_layer_norm.{part}"] = tensors[f"{source}/ffn/layer_norm/{gamma}"]
            state[f"{target}.self_attn.out_proj.{part}"] = tensors[f"{source}/self_attention/linear_1/{part}"]
            state[f"{target}.fc1.{part}"] = tensors[f"{source}/ffn/linear_0/{part}"]
            state[f"{target}.fc2.{part}"] = tensors[f"{source}/ffn/linear_1/{part}"]
            stacked = tensors[f"{source}/self_attention/linear_0/{part}"]
            for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                if (name, part) != ("k_proj", "bias"):
                    state[f"{target}.self_attn.{name}.{part}"] = stacked[512 * index : 512 * (index + 1)]
    return state


def test_whisper_base_equals_transformers(step_data):
    path = step_data / "whisper-base" / "model.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not there: run `step-megatron data fetch`")
    ours = AudioEncoder(WHISPER_BASE, block=256).load(path.parent)
    assert_equals_whisper(ours, whisper_base_for_huggingface(path), (40, 250), atol=2e-4)
