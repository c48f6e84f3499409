"""Rotary position embedding from per-token positions.

Megatron's own rotary code for packed sequences reads `cu_seqlens` back to the host in every layer. Here the cosines and sines of
the micro-batch's positions are looked up once per forward pass, and each layer multiplies.

    out = x * cos(p f) + rotate_half(x) * sin(p f),   f_i = base^(-2i / d),   rotate_half([a, b]) = [-b, a]

Source: Su et al., RoFormer (arXiv:2104.09864), in the half-rotated layout of GPT-NeoX, LLaMA and Qwen2.
"""

import torch
from step_kernels import rope_qk


class RotaryTable(torch.nn.Module):
    """Cosines and sines of all positions, computed once in float32.

    Args:
        head_width: width of one head, even.
        max_positions: positions that the table holds.
        base: rotary base (theta).
        device: where the table lives.
    """

    def __init__(self, head_width: int, max_positions: int, base: float, device: torch.device | str = "cpu"):
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width)
        angles = torch.arange(max_positions, dtype=torch.float32, device=device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each `[T, 1, head_width]` in `dtype`, of `position_ids` `[T]`.

        Padding may lengthen the last segment of a micro-batch beyond `max_positions` (samples do not, the loader sees to it): it
        takes the last position's.
        """
        position_ids = position_ids.clamp(max=self.cos.shape[0] - 1)
        return (
            self.cos.index_select(0, position_ids).to(dtype).unsqueeze(1),
            self.sin.index_select(0, position_ids).to(dtype).unsqueeze(1),
        )


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate query and key `[T, heads, head_width]` by the cosine and sine that `RotaryTable` gave for their tokens."""
    return rope_qk(query, key, *(part.squeeze(1) for part in rotary))
