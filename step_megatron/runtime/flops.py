"""Floating-point operations that the model needs, in closed form, and the share of the device's peak that a step reaches (MFU).

A multiply-add is two operations. Only what the mathematics asks for is counted: causal attention is counted as its lower
triangle, packed segments see themselves only, recomputation and padding count for nothing. Norms, activations, rotary
embedding and softmax are left out (under 1%), as in Megatron's and PaLM's counts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from step_megatron.config.schema import AdaptorConfig, Config, EncoderConfig, LoRAConfig


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass: `linear` in products with weights, `attention` in products of activations."""

    linear: int
    attention: int = 0

    @property
    def forward(self) -> int:
        return self.linear + self.attention

    def training(self, weights: bool = True, inputs: bool = True) -> int:
        """Forward and backward: each product with a weight has one more for the weight's and one for the input's gradient.

        Args:
            weights: the weights are trained.
            inputs: something before this part is trained, so that the gradient has to go through it.
        """
        if not (weights or inputs):
            return self.forward
        return self.linear * (1 + weights + inputs) + 3 * self.attention

    def __add__(self, other: "Work") -> "Work":
        return Work(self.linear + other.linear, self.attention + other.attention)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes that a decoder's operations depend on."""

    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool = True

    @classmethod
    def of(cls, config: Config) -> "DecoderShape":
        """The shape in `config.megatron.transformer`, with Megatron's defaults for what it leaves out."""
        settings = config.megatron.transformer
        missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if name not in settings]
        if missing:
            raise ValueError(f"megatron.transformer.{missing[0]} is not set; choose a model.preset or set it")
        heads, width = settings["num_attention_heads"], settings["hidden_size"]
        return cls(
            layers=settings["num_layers"],
            width=width,
            ffn_width=settings.get("ffn_hidden_size") or 4 * width,
            heads=heads,
            kv_heads=settings.get("num_query_groups") or heads,
            head_dim=settings.get("kv_channels") or width // heads,
            vocabulary=config.model.vocabulary_size,
            gated=settings.get("gated_linear_unit", True),
        )


def decoder_work(shape: DecoderShape, segments: Iterable[int], predicted: int | None = None) -> Work:
    """Operations of the decoder's forward pass.

    Args:
        segments: lengths of the packed segments, in tokens; attention is causal and stays inside a segment.
        predicted: tokens that go through the output layer, all of them when None.
    """
    lengths = list(segments)
    tokens = sum(lengths)
    query = shape.heads * shape.head_dim
    projections = shape.width * (query + 2 * shape.kv_heads * shape.head_dim) + query * shape.width
    mlp = shape.width * shape.ffn_width * (3 if shape.gated else 2)
    linear = 2 * tokens * shape.layers * (projections + mlp)
    linear += 2 * (tokens if predicted is None else predicted) * shape.width * shape.vocabulary
    # Query-key and probability-value products, each over the pairs (i, j <= i).
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Work(linear, 2 * 2 * pairs * query * shape.layers)


def encoder_work(encoder: EncoderConfig, frames: Iterable[int]) -> Work:
    """Operations of the audio encoder's forward pass.

    Args:
        frames: attention positions (50 Hz) of each chunk; the first convolution runs at twice that rate.
    """
    lengths = list(frames)
    positions = sum(lengths)
    width = encoder.width
    convolutions = 3 * (2 * encoder.mels * width + width * width)
    layer = 4 * width * width + 2 * width * encoder.ffn_width
    pairs = sum(length * length for length in lengths)
    return Work(2 * positions * (convolutions + encoder.layers * layer), 2 * 2 * pairs * width * encoder.layers)


def adaptor_work(encoder: EncoderConfig, adaptor: AdaptorConfig, out_width: int, frames: Iterable[int]) -> Work:
    """Operations of the adaptor's forward pass.

    Args:
        out_width: the decoder's width.
        frames: encoder frames (25 Hz) of each chunk.
    """
    if adaptor.kind == "linear":
        return Work(2 * sum(frames) * encoder.width * out_width)
    tokens = sum((length - 1) // 2 + 1 for length in frames)
    return Work(2 * tokens * (3 * encoder.width**2 + encoder.width * adaptor.width + adaptor.width * out_width))


def lora_work(shape: DecoderShape, lora: LoRAConfig, tokens: int) -> Work:
    """Operations of the adapters' forward pass; nothing where the rank is 0."""
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = {
        "linear_qkv": shape.width + query + 2 * keys,
        "linear_proj": query + shape.width,
        "linear_fc1": shape.width + shape.ffn_width * (2 if shape.gated else 1),
        "linear_fc2": shape.ffn_width + shape.width,
    }
    return Work(2 * tokens * shape.layers * lora.rank * sum(widths[name] for name in lora.targets))


def training_flops(
    config: Config,
    segments: Sequence[int],
    audio_frames: Sequence[int] = (),
    decoder_trained: bool = True,
    adaptor_trained: bool = True,
    predicted: int | None = None,
) -> int:
    """Operations of forward and backward over some packed micro-batches, all ranks together; the frozen encoder not included.

    Args:
        segments: lengths of the packed segments without padding, in tokens.
        audio_frames: encoder frames (25 Hz) of each audio chunk in them.
        decoder_trained, adaptor_trained: whether any of their weights are; LoRA's adapters are beside them, and trained.
        predicted: tokens that go through the output layer, all of them when None.
    """
    shape = DecoderShape.of(config)
    through = decoder_trained or adaptor_trained or config.model.lora.rank > 0
    decoder = decoder_work(shape, segments, predicted).training(decoder_trained, inputs=through)
    decoder += lora_work(shape, config.model.lora, sum(segments)).training()
    adaptor = adaptor_work(config.encoder, config.adaptor, shape.width, audio_frames).training(adaptor_trained, inputs=False)
    return decoder + adaptor


# Dense peaks in TFLOP/s as (pattern of the device's name, bf16, fp8), the first match counts. Source: NVIDIA's data sheets; the
# figures with sparsity there are halved. None: the device has no such units.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bB200\b", 2250.0, 4500.0),
    (r"\bH200 NVL\b", 835.5, 1670.5),
    (r"\bH200\b", 989.4, 1978.9),
    (r"\bH100 PCIe\b", 756.0, 1513.0),
    (r"\bH100 NVL\b", 835.5, 1670.5),
    (r"\bH[18]00\b", 989.4, 1978.9),
    (r"\bH20\b", 148.0, 296.0),
    (r"\bA[18]00\b", 312.0, None),
    (r"\bL40S\b", 362.0, 733.0),
    (r"\bL4\b", 121.0, 242.5),
    (r"\bA40\b", 149.7, None),
    (r"\bA10\b", 125.0, None),
)


def peak_flops(device_name: str, dtype: str = "bf16") -> float | None:
    """The dense peak of a device in FLOP/s, None when it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` says it, e.g. `NVIDIA H100 80GB HBM3`.
        dtype: `bf16` or `fp8`.
    """
    if dtype not in ("bf16", "fp8"):
        raise ValueError(f"peaks are known for bf16 and fp8, not for {dtype!r}")
    for pattern, bf16, fp8 in _PEAKS:
        if re.search(pattern, device_name.replace("-", " "), re.IGNORECASE):
            peak = bf16 if dtype == "bf16" else fp8
            return None if peak is None else peak * 1e12
    return None


def precision(transformer: Mapping[str, Any]) -> str | None:
    """`fp8` or `bf16` (fp16 is as fast) for what the products of `megatron.transformer` run in; None for others, such as fp32."""
    if transformer.get("fp4"):
        return None
    if transformer.get("fp8"):
        return "fp8"
    return "bf16" if transformer.get("bf16") or transformer.get("fp16") else None


def device_peak(device: torch.device, dtype: str | None) -> float | None:
    """`peak_flops` of a torch device for `precision`; None where it is not known.

    A CPU's depends on clocks that nobody publishes; fp32 is no entry of the table: it may or may not run as TF32.
    """
    known = device.type == "cuda" and dtype is not None
    return peak_flops(torch.cuda.get_device_name(device), dtype) if known else None


def model_flops_utilisation(flops: float, seconds: float, devices: int, peak: float | None) -> float | None:
    """The share of the devices' peak that `flops` in `seconds` makes, None when the peak is not known."""
    if seconds <= 0 or devices < 1:
        raise ValueError(f"seconds has to be positive and devices at least 1, got {seconds} and {devices}")
    return None if peak is None else flops / (seconds * devices * peak)
