"""The critic's head: one number a token, what the rest of the response is expected to be worth."""

import torch
import torch.nn.functional as F

NAME = "value_head"


class ValueHead(torch.nn.Module):
    """v = w h + b, computed in float32; whole on every tensor-parallel rank.

    Its parameters have the type of the model's: Megatron's distributed optimizer saves one type only. The optimizer's own copy is
    exact. It begins at zero: a critic that begins as the policy expects nothing, and the first advantages are the rewards.
    """

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, width, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, width]` -> `[n]` float32 (float64 for float64)."""
        exact = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(exact), self.weight.to(exact), self.bias.to(exact)).squeeze(-1)


def is_value_head(name: str) -> bool:
    """Whether a parameter's name is one of the critic's head."""
    return NAME in name.split(".")
