"""AudioEncoder equals transformers' Qwen2AudioEncoder and WhisperEncoder on the same weights, at ragged lengths."""

import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen2AudioEncoderConfig, WhisperConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder, build_encoder
from step_megatron.model.whisper import from_huggingface

SMALL = EncoderConfig(mels=16, width=48, layers=3, heads=4, ffn_width=96)
WHISPER_BASE = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048)
VALID_MEL_FRAMES = (1, 2, 3, 4, 5, 6, 7, 8, 33, 34, 101, 102, 103, 104, 104, 104, 700, 2500)
# The log-mel of silence under Whisper's floor for a clip with a peak of 0 dB: (-8 + 4) / 4.
SILENCE = -1.0


def log_mels(mels: int, valid: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random frames; the two tail frames differ from silence, as those of a real clip do (its last samples reach into them)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(mels, frames + 2, generator=generator) for frames in valid]


def padded(log_mel: torch.Tensor) -> torch.Tensor:
    """One clip as Hugging Face's processor hands it over: 3,000 frames, silence after the clip."""
    return torch.nn.functional.pad(log_mel, (0, 3000 - log_mel.shape[1]), value=SILENCE)[None]


def huggingface_sizes(config: EncoderConfig) -> dict:
    return {
        "num_mel_bins": config.mels,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.ffn_width,
        "max_source_positions": config.max_positions,
        "attn_implementation": "eager",
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
    """Features of one clip with the attention mask that Qwen2AudioModel makes from the processor's feature mask."""
    valid = torch.zeros(1, 3000, dtype=torch.int64)
    valid[:, : log_mel.shape[1] - 2] = 1
    positions, features = encoder._get_feat_extract_output_lengths(valid.sum(-1))
    mask = torch.zeros(1, 1, 1500, 1500)
    mask[:, :, :, positions.item() :] = float("-inf")
    return encoder(padded(log_mel), attention_mask=mask).last_hidden_state[0, : max(0, features.item())]


def test_equals_qwen2_audio_encoder_at_ragged_lengths():
    theirs = randomised(Qwen2AudioEncoder(Qwen2AudioEncoderConfig(**huggingface_sizes(SMALL))))
    ours = AudioEncoder(SMALL, block=128)
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    clips = log_mels(SMALL.mels, VALID_MEL_FRAMES)
    with torch.no_grad():
        for clip, actual in zip(clips, ours.encode(clips), strict=True):
            expected = qwen2_audio(theirs, clip)
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
