"""Closed-form operation counts against torch's own counter on small modules, and against the published sizes."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from step_megatron.config.schema import AdaptorConfig, Config, EncoderConfig, MegatronConfig, ModelConfig
from step_megatron.runtime.flops import (
    DecoderShape,
    Work,
    adaptor_work,
    decoder_work,
    encoder_work,
    model_flops_utilisation,
    peak_flops,
    precision,
    training_flops,
)

SHAPE = DecoderShape(layers=2, width=24, ffn_width=40, heads=4, kv_heads=2, head_dim=8, vocabulary=50)
ENCODER = EncoderConfig(mels=5, width=16, layers=2, heads=2, ffn_width=24)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def decode(shape, length, requires_grad=False):
    """A decoder of matrix products only; each query meets exactly the keys up to its own: nothing above the diagonal."""
    query = shape.heads * shape.head_dim
    kv = shape.kv_heads * shape.head_dim
    sizes = [(shape.width, query), (shape.width, kv), (shape.width, kv), (query, shape.width)]
    sizes += [(shape.width, shape.ffn_width)] * 2 + [(shape.ffn_width, shape.width)]
    hidden = torch.randn(length, shape.width, requires_grad=requires_grad)
    for _ in range(shape.layers):
        q, k, v, out, gate, up, down = (torch.randn(size, requires_grad=requires_grad) for size in sizes)
        queries = (hidden @ q).view(length, shape.heads, 1, shape.head_dim)
        groups = shape.heads // shape.kv_heads
        keys, values = ((hidden @ w).view(length, shape.kv_heads, -1).repeat_interleave(groups, 1) for w in (k, v))
        rows = []
        for i in range(length):
            scores = queries[i] @ keys[: i + 1].permute(1, 2, 0)
            rows.append((scores.softmax(-1) @ values[: i + 1].transpose(0, 1)).flatten())
        hidden = torch.stack(rows) @ out
        hidden = (functional.silu(hidden @ gate) * (hidden @ up)) @ down
    return hidden @ torch.randn(shape.width, shape.vocabulary, requires_grad=requires_grad)


@pytest.mark.parametrize("segments", [[1], [7], [5, 3, 6]])
def test_decoder_forward(segments):
    assert decoder_work(SHAPE, segments).forward == counted(lambda: [decode(SHAPE, length) for length in segments])


def test_decoder_forward_and_backward():
    assert decoder_work(SHAPE, [6]).training() == counted(lambda: decode(SHAPE, 6, requires_grad=True).sum().backward())


def test_predicting_fewer_tokens_saves_their_share_of_the_output_layer():
    saved = decoder_work(SHAPE, [10]).forward - decoder_work(SHAPE, [10], predicted=4).forward
    assert saved == counted(lambda: torch.randn(6, SHAPE.width) @ torch.randn(SHAPE.width, SHAPE.vocabulary))


def encode(encoder, positions):
    width = encoder.width
    mel = torch.randn(1, encoder.mels, 2 * positions)
    hidden = functional.conv1d(mel, torch.randn(width, encoder.mels, 3), padding=1)
    hidden = functional.conv1d(hidden, torch.randn(width, width, 3), stride=2, padding=1)[0].T
    for _ in range(encoder.layers):
        q, k, v = ((hidden @ torch.randn(width, width)).view(positions, encoder.heads, -1).transpose(0, 1) for _ in range(3))
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        hidden = mixed.transpose(0, 1).flatten(1) @ torch.randn(width, width)
        hidden = hidden @ torch.randn(width, encoder.ffn_width) @ torch.randn(encoder.ffn_width, width)


@pytest.mark.parametrize("frames", [[8], [3, 11]])
def test_encoder(frames):
    assert encoder_work(ENCODER, frames).forward == counted(lambda: [encode(ENCODER, length) for length in frames])


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_step_adaptor(length):
    adaptor = AdaptorConfig(width=12)

    def run():
        hidden = functional.conv1d(torch.randn(1, 16, length), torch.randn(16, 16, 3), stride=2, padding=1)[0].T
        return hidden @ torch.randn(16, 12) @ torch.randn(12, 24)

    assert adaptor_work(ENCODER, adaptor, 24, [length]).forward == counted(run)


def test_linear_adaptor():
    adaptor = AdaptorConfig(kind="linear")
    assert adaptor_work(ENCODER, adaptor, 24, [7, 2]).forward == counted(lambda: torch.randn(9, 16) @ torch.randn(16, 24))


@pytest.mark.parametrize("weights, inputs", [(True, True), (True, False), (False, True), (False, False)])
def test_backward_of_frozen_and_first_parts(weights, inputs):
    x, w = torch.randn(3, 4, requires_grad=inputs), torch.randn(4, 5, requires_grad=weights)

    def run():
        out = x @ w
        if out.requires_grad:
            out.sum().backward()

    assert Work(2 * 3 * 4 * 5).training(weights, inputs) == counted(run)


def small_config():
    transformer = {"num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 4}
    transformer |= {"num_query_groups": 2, "kv_channels": 8}
    return Config(model=ModelConfig(vocabulary_size=50), encoder=ENCODER, megatron=MegatronConfig(transformer=transformer))


def test_training_adds_up_its_parts():
    config = small_config()
    assert DecoderShape.of(config) == SHAPE
    decoder, adaptor = decoder_work(SHAPE, [9, 4]), adaptor_work(ENCODER, config.adaptor, 24, [6])
    assert training_flops(config, [9, 4]) == decoder.training()
    assert training_flops(config, [9, 4], [6]) == 3 * decoder.forward + 2 * adaptor.forward
    frozen = training_flops(config, [9, 4], [6], decoder_trained=False)
    assert frozen == 2 * decoder.linear + 3 * decoder.attention + 2 * adaptor.forward
    with pytest.raises(ValueError, match="num_layers is not set"):
        training_flops(Config(), [9])


def test_published_sizes():
    """2 operations a parameter and token: 32.83 B decoder parameters, of which the 0.81 B input embeddings multiply nothing."""
    large = DecoderShape(64, 5120, 27648, 40, 8, 128, 158720)
    assert decoder_work(large, [1]).linear / 2 == pytest.approx(32.83e9 - 158720 * 5120, rel=1e-3)
    base = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048)
    # 50 positions an audio-second: 2.07 GFLOP, measured on whisper-base at some length; attention grows with it.
    assert encoder_work(base, [50]).linear == pytest.approx(2.0e9, rel=0.06)


@pytest.mark.parametrize(
    "name, bf16, fp8",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 1978.9e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H200", 989.4e12, 1978.9e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("NVIDIA L40S", 362e12, 733e12),
        ("NVIDIA L4", 121e12, 242.5e12),
        ("Some Accelerator 9000", None, None),
    ],
)
def test_device_peaks(name, bf16, fp8):
    assert peak_flops(name) == bf16
    assert peak_flops(name, "fp8") == fp8


@pytest.mark.parametrize(
    "transformer, expected",
    [({}, None), ({"bf16": True}, "bf16"), ({"fp16": True}, "bf16"), ({"bf16": True, "fp8": "hybrid"}, "fp8")],
)
def test_the_peak_is_that_of_the_precision_in_use(transformer, expected):
    assert precision(transformer) == expected


def test_utilisation_is_unknown_without_a_peak():
    assert model_flops_utilisation(5e14, 1.0, 2, 1e15) == 0.25
    assert model_flops_utilisation(5e14, 1.0, 2, None) is None
    with pytest.raises(ValueError, match="seconds has to be positive"):
        model_flops_utilisation(1.0, 0.0, 1, None)
