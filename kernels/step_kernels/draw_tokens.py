"""The next token of every row of logits, and its log-probability.

    p = softmax(logits / temperature)     greedy (temperature 0): the likeliest id, p at temperature 1
    sampled: the first id at which the cumulative p is above u, a number in [0, 1) that the row's seed and draw alone decide

Drawing by one random number a row, instead of one an id, is what makes a sample depend on nothing else in the batch, and lets it
start again without state. In torch that is seven passes over the logits; the C++ kernel makes two over the logits and looks for
the id among sums of blocks. On a GPU it is torch: not a hundredth of a step there.
"""

import torch

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.softmax_rows import token_log_probs

OP = "draw_tokens"
registry.register(OP, cpp=(torch.float32,))
# SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014), as signed 64-bit integers.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def uniform(seeds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Number `draws` of the generator `seeds`, both int64: float32 in [0, 1), a multiple of 2^-24."""
    mixed = seeds + (draws + 1) * _GOLDEN
    # Shifts of signed integers bring the sign in: what it fills is masked.
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return ((mixed >> 40) & 0xFFFFFF).float() * 2.0**-24


def at_number(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first id of each row, `[rows]`, whose cumulative weight is above `numbers` in [0, 1) times the whole weight."""
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may bring the product up to the whole, above which no place is.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)


def draw_tokens_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    draws: torch.Tensor,
    forced: torch.Tensor,
    sampled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the op in plain torch; arguments as in `draw_tokens`."""
    policy = logits / torch.where(temperature > 0, temperature, 1.0)[:, None] if sampled else logits
    tokens = policy.argmax(-1)
    if sampled:
        tokens = torch.where(temperature > 0, at_number(policy.softmax(-1), uniform(seeds, draws)), tokens)
    tokens = torch.where(forced >= 0, forced, tokens)
    return tokens, token_log_probs(policy, tokens)


def draw_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    draws: torch.Tensor,
    forced: torch.Tensor,
    sampled: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for every row; a row's result depends on that row alone, to the bit. Not differentiable.

    Args:
        logits: `[rows, vocabulary]`.
        temperature: `[rows]` float32, 0 for the likeliest token.
        seeds, draws: `[rows]` int64: which generator, and which of its numbers.
        forced: `[rows]` int64: the token that has to come, -1 for none.
        sampled: whether any temperature is above 0; without, less is computed.

    Returns:
        Tokens `[rows]` int64 and their log-probabilities `[rows]` float32; NaN where a logit is not finite.

    Raises:
        ValueError: no vocabulary, or a row's settings are missing.
    """
    settings = {"temperature": temperature, "seeds": seeds, "draws": draws, "forced": forced}
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"{OP}: logits {tuple(logits.shape)} must be [rows, vocabulary]")
    for name, values in settings.items():
        if values.shape != logits.shape[:1]:
            raise ValueError(f"{OP}: {name} {tuple(values.shape)} must be [{logits.shape[0]}], one for each row of logits")
    if registry.backend(OP, logits) == "cpp":
        return _op(logits, temperature, seeds, draws, forced)
    return draw_tokens_reference(logits, temperature, seeds, draws, forced, sampled)


@operator("step::draw_tokens")
def _op(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, draws: torch.Tensor, forced: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, logprobs = torch.empty_like(seeds), logits.new_empty(logits.shape[0])
    native.ops().draw_tokens(logits.contiguous(), temperature, seeds, draws, forced, tokens, logprobs)
    return tokens, logprobs


@_op.register_fake
def _(logits, temperature, seeds, draws, forced):
    return torch.empty_like(seeds), logits.new_empty(logits.shape[0])
