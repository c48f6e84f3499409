"""Cases of what a decoding step does beside attention: linear layers of few rows, and the choice of tokens."""

import torch
import torch.nn.functional as F

from step_kernels import draw_tokens, skinny_linear
from step_kernels.bench.contestants import compiled, eager, forward_only, ours
from step_kernels.bench.harness import Case
from step_kernels.draw_tokens import at_number, uniform

# Rows, inner size and outputs: the layers of `tiny` and `smol-135m` at 32 running samples, and fewer and more rows.
_LINEARS = (
    (32, 256, 512), (32, 256, 1536), (32, 768, 256), (32, 256, 4096),
    (32, 576, 960), (32, 576, 3072), (32, 1536, 576), (32, 576, 49_152),
    (4, 576, 3072), (8, 576, 3072), (16, 576, 3072), (64, 576, 3072),
)  # fmt: skip
_DRAWS = ((32, 4096), (32, 49_152), (32, 152_064))
# The same product by the library: as fast is all that is asked for.
_SAME_WORK, _EAGER, _COMPILED = 1.0, 2.0, 1.0


def linear_cases(device: torch.device) -> list[Case]:
    """Products of a weight with few rows, beside the library's."""
    cases = []
    for rows, inner, outputs in _LINEARS:
        x, weight = (
            torch.randn(size, inner, generator=torch.Generator().manual_seed(size)).to(device) for size in (rows, outputs)
        )
        contestants = [
            *ours("skinny_linear", forward_only(lambda x=x, weight=weight: skinny_linear(x, weight)), device),
            eager(forward_only(lambda x=x, weight=weight: F.linear(x, weight)), _SAME_WORK),
        ]
        cases.append(Case("skinny-linear", f"{rows} x {inner} -> {outputs}", contestants))
    return cases


def _eager_draw(logits, temperature, seeds, draws, forced):
    policy = logits / temperature[:, None]
    tokens = torch.where(forced >= 0, forced, at_number(policy.softmax(-1), uniform(seeds, draws)))
    return tokens, policy.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _eager_likeliest(logits, temperature, seeds, draws, forced):
    tokens = torch.where(forced >= 0, forced, logits.argmax(-1))
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def draw_cases(device: torch.device) -> list[Case]:
    """Tokens of 32 rows, sampled and greedy, at the vocabularies of `tiny`, SmolLM2 and Qwen2.5."""
    cases = []
    for rows, width in _DRAWS:
        logits = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).to(device)
        counter = torch.arange(rows, device=device)
        for name, temperature, in_torch in (("sampled", 1.0, _eager_draw), ("greedy", 0.0, _eager_likeliest)):
            settings = torch.full((rows,), temperature, device=device), counter, counter, torch.full_like(counter, -1)
            arguments, sampled = (logits, *settings), temperature > 0
            contestants = [
                *ours("draw_tokens", lambda a=arguments, s=sampled: draw_tokens(*a, s), device),
                eager(lambda a=arguments, f=in_torch: f(*a), _EAGER),
                compiled(in_torch, arguments, _COMPILED),
            ]
            cases.append(Case("draw-tokens", f"{rows} x {width}, {name}", contestants))
    return cases


CASES = {"skinny-linear": linear_cases, "draw-tokens": draw_cases}
