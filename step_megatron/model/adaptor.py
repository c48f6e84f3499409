"""The trained bridge from encoder features to the decoder's embeddings, over packed chunks.

    step      Conv1d(k 3, s 2, p 1) -> GELU -> Linear -> ReLU -> Linear     25 Hz -> 12.5 Hz, Step-Audio 2's
    linear    Linear                                                        25 Hz, Qwen2-Audio's projector

Small (18 M parameters at 32B), so it is plain torch and replicated over tensor-parallel ranks. What the last convolution tap
reads beyond a chunk's end is settled by the encoder (`compat`, see `step_megatron.model.encoder`): the frames given here are all
there is.
"""

from collections.abc import Sequence

import torch
from step_kernels import conv_downsample_gelu
from step_kernels.segments import cumulative
from torch import nn

from step_megatron.config.schema import AdaptorConfig, EncoderConfig
from step_megatron.model.mapping import Entry


def adaptor_entries(encoder: EncoderConfig, config: AdaptorConfig, out_width: int, prefix: str) -> list[Entry]:
    """The adaptor's parameters, and their names in a layout where they begin with `prefix`."""
    width, inner = encoder.width, config.width
    shapes = {"linear.weight": (out_width, width), "linear.bias": (out_width,)}
    if config.kind == "step":
        shapes = {
            "conv.weight": (width, width, 3),
            "conv.bias": (width,),
            "linear1.weight": (inner, width),
            "linear1.bias": (inner,),
        }
        shapes |= {"linear2.weight": (out_width, inner), "linear2.bias": (out_width,)}
    return [Entry(name, ((prefix + name, shape),)) for name, shape in shapes.items()]


class PackedConv(nn.Conv1d):
    """`Conv1d(k 3, s 2, p 1)` and GELU over packed chunks.

    A module that is called, not only a holder of weights: Megatron's overlapped parameter gathering waits for a module's weights
    in a hook before its forward, so weights that another module reads directly would still be those of the step before.
    """

    def forward(self, features: torch.Tensor, starts: torch.Tensor, rows: int) -> torch.Tensor:
        """`[sum(frames), width]` -> `[rows, width]`."""
        return conv_downsample_gelu(features, starts, self.weight, self.bias, rows)


class AudioAdaptor(nn.Module):
    """Map encoder features to decoder embeddings; parameters carry the released names (`conv`, `linear1`, `linear2`).

    Args:
        encoder: gives the input width.
        config: kind, inner width, compat.
        out_width: the decoder's hidden size.

    Raises:
        ValueError: for `compat=step` with the linear adaptor, which has no convolution tap to reproduce.
    """

    def __init__(self, encoder: EncoderConfig, config: AdaptorConfig, out_width: int):
        super().__init__()
        if config.kind == "linear" and config.compat == "step":
            raise ValueError("adaptor.compat=step reproduces the step adaptor's convolution; adaptor.kind=linear has none")
        self.kind = config.kind
        if self.kind == "linear":
            self.linear = nn.Linear(encoder.width, out_width)
            return
        self.conv = PackedConv(encoder.width, encoder.width, 3, stride=2, padding=1)
        self.linear1 = nn.Linear(encoder.width, config.width)
        self.linear2 = nn.Linear(config.width, out_width)

    def tokens_out(self, frames: int) -> int:
        """Decoder tokens for one chunk of `frames` encoder features."""
        return frames if self.kind == "linear" else (frames + 1) // 2

    def forward(self, features: torch.Tensor, frames: Sequence[int], starts: torch.Tensor | None = None) -> torch.Tensor:
        """Adapt packed chunks; no chunk at all gives `[0, out_width]`, through which all parameters get zero gradients.

        Args:
            features: `[sum(frames), encoder width]`, any floating type (the cache holds bfloat16), on the parameters' device.
            frames: features of each chunk, on the host.
            starts: `[chunks + 1]` int32, `cumulative(frames)` on the parameters' device; copied there now when None.

        Returns:
            `[sum(tokens), out_width]` in the parameters' type.

        Raises:
            ValueError: if the frames do not add up to the features.
        """
        if sum(frames) != features.shape[0]:
            raise ValueError(f"{len(frames)} chunks hold {sum(frames)} frames, but {features.shape[0]} features were given")
        if self.kind == "linear":
            return self.linear(features.to(self.linear.weight.dtype))
        rows = sum(map(self.tokens_out, frames))
        starts = cumulative(frames, features.device) if starts is None else starts
        hidden = self.conv(features, starts, rows)
        return self.linear2(torch.relu(self.linear1(hidden)))
