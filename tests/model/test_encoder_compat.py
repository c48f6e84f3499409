"""`compat=step` reproduces the released batch-1 code, `clean` differs from it only where an invalid frame was read."""

import pytest
import torch
from torch.nn.functional import conv1d, gelu, layer_norm, linear

from step_megatron.config.schema import AdaptorConfig, EncoderConfig
from step_megatron.model.adaptor import AudioAdaptor
from step_megatron.model.encoder import AudioEncoder

CONFIG = EncoderConfig(mels=8, width=16, layers=2, heads=2, ffn_width=32)
VALID = (5, 6, 7, 8, 9, 10, 11, 12, 61, 62, 63, 64, 65, 66, 67, 68, 69)


def released(encoder: AudioEncoder, adaptor: AudioAdaptor, log_mel: torch.Tensor) -> torch.Tensor:
    """The published forward pass for a batch of one clip, in float64: all T frames go in, T - 2 of them count as valid.

    The mask hides the invalid position as a key only; pooling, norm and the adaptor's convolution see everything.
    """
    weights = {name: tensor.double() for name, tensor in [*encoder.state_dict().items(), *adaptor.state_dict().items()]}
    frames = log_mel.shape[1]
    x = gelu(conv1d(log_mel[None].double(), weights["conv1.weight"], weights["conv1.bias"], padding=1))
    x = gelu(conv1d(x, weights["conv2.weight"], weights["conv2.bias"], stride=2, padding=1))[0].t()
    valid = torch.arange(frames)[(frames + 1) % 2 :: 2] < frames - 2
    assert valid.shape[0] == x.shape[0]
    x = x + weights["positional_embedding.weight"][: x.shape[0]]
    width, heads = CONFIG.width, CONFIG.heads
    for layer in range(CONFIG.layers):
        block = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        normed = layer_norm(x, (width,), block["attn_ln.weight"], block["attn_ln.bias"])
        q, k, v = (
            linear(normed, block[f"attn.{n}.weight"], block.get(f"attn.{n}.bias")).unflatten(1, (heads, -1)).transpose(0, 1)
            for n in ("query", "key", "value")
        )
        scale = (width // heads) ** -0.25
        scores = (q * scale) @ (k * scale).transpose(1, 2)
        attended = torch.softmax(scores.masked_fill(~valid, -1e10), -1) @ v
        x = x + linear(attended.transpose(0, 1).flatten(1), block["attn.out.weight"], block["attn.out.bias"])
        normed = layer_norm(x, (width,), block["mlp_ln.weight"], block["mlp_ln.bias"])
        hidden = gelu(linear(normed, block["mlp.0.weight"], block["mlp.0.bias"]))
        x = x + linear(hidden, block["mlp.2.weight"], block["mlp.2.bias"])
    x = torch.nn.AvgPool1d(2, 2)(x.t()[None])[0].t()
    x = layer_norm(x, (width,), weights["after_norm.weight"], weights["after_norm.bias"])
    tokens = ((frames - 2 + 1) // 2 // 2 + 2 - 3) // 2 + 1
    x = gelu(conv1d(x.t()[None], weights["conv.weight"], weights["conv.bias"], stride=2, padding=1))[0].t()
    x = torch.relu(linear(x, weights["linear1.weight"], weights["linear1.bias"]))
    return linear(x, weights["linear2.weight"], weights["linear2.bias"])[:tokens]


def embeddings(compat: str, log_mels: list[torch.Tensor]) -> tuple[list[torch.Tensor], AudioEncoder, AudioAdaptor]:
    encoder = AudioEncoder(CONFIG, block=64, compat=compat).reset_parameters(1)
    torch.manual_seed(2)
    # The encoder's names and the adaptor's are distinct (`conv1` against `conv`), so one dict can hold both.
    adaptor = AudioAdaptor(CONFIG, AdaptorConfig(width=24, compat=compat), out_width=12)
    features = encoder.encode(log_mels)
    frames = tuple(feature.shape[0] for feature in features)
    with torch.no_grad():
        out = adaptor(torch.cat(features), frames)
    return list(out.split([adaptor.tokens_out(count) for count in frames])), encoder, adaptor


@pytest.fixture(scope="module")
def log_mels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(CONFIG.mels, valid + 2, generator=generator) for valid in VALID]


def test_step_equals_the_released_code(log_mels):
    ours, encoder, adaptor = embeddings("step", log_mels)
    for actual, log_mel in zip(ours, log_mels, strict=True):
        torch.testing.assert_close(actual.double(), released(encoder, adaptor, log_mel), rtol=0, atol=1e-5)


def test_clean_differs_only_in_the_last_token_of_a_quarter_of_the_lengths(log_mels):
    clean, step = embeddings("clean", log_mels)[0], embeddings("step", log_mels)[0]
    for valid, ours, theirs in zip(VALID, clean, step, strict=True):
        assert torch.allclose(ours[:-1], theirs[:-1], atol=1e-6)
        reads_invalid = (valid + 1) // 2 % 4 == 3
        assert torch.allclose(ours[-1], theirs[-1], atol=1e-3) != reads_invalid


def test_the_linear_adaptor_has_nothing_to_reproduce():
    with pytest.raises(ValueError, match="adaptor.kind=linear has none"):
        AudioAdaptor(CONFIG, AdaptorConfig(kind="linear", compat="step"), 4)
