"""Logits to tokens, for a batch whose rows have settings of their own; nothing is read back to the host.

A row's random number is a hash of its seed and of how many it has drawn, so it depends on nothing else in the batch, and a sample
that starts again needs no state.
"""

from dataclasses import dataclass

import torch
from step_kernels.softmax_rows import token_log_probs

# SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014), as signed 64-bit integers.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True)
class Needs:
    """What the rows of a batch ask for; the rest is not computed.

    Attributes:
        draws: some row samples.
        truncates: some row has top-p or top-k.
        penalises: some row has a repetition penalty.
        bans: some row may not stop yet.
    """

    draws: bool = False
    truncates: bool = False
    penalises: bool = False
    bans: bool = False


@dataclass
class RowSettings:
    """Settings of the rows, on the device.

    Attributes:
        temperature: `[rows]` float32, 0 is greedy.
        top_p: `[rows]` float32. top_k: `[rows]` int64, 0 is all.
        penalty: `[rows]` float32. seen: `[rows, vocabulary]` bool, what the penalty falls on.
        seeds, draws: `[rows]` int64, seed and number of the next random number.
        forced: `[rows]` int64, the token that has to come, -1 for none.
        banned: `[rows, n]` int64 ids; ban: `[rows, n]` float32, -inf where an id may not come, else 0.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    penalty: torch.Tensor
    seeds: torch.Tensor
    draws: torch.Tensor
    forced: torch.Tensor
    banned: torch.Tensor
    ban: torch.Tensor
    seen: torch.Tensor | None = None


def uniform(seeds: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Number `draws` of the generator `seeds`, both int64: float32 in [0, 1), a multiple of 2^-24."""
    mixed = seeds + (draws + 1) * _GOLDEN
    # Shifts of signed integers bring the sign in: what it fills is masked.
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    mixed = mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
    return ((mixed >> 40) & 0xFFFFFF).float() * 2.0**-24


def choose(logits: torch.Tensor, rows: RowSettings, needs: Needs) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of every row.

    Args:
        logits: `[rows, vocabulary]` float32.
        rows: their settings.
        needs: what any of them asks for.

    Returns:
        tokens `[rows]` int64, and `[rows]` float32, their log-probabilities under the policy: the softmax of the logits over the
        temperature (1 where that is 0), with nothing banned, penalised or cut off.
    """
    policy = logits
    if needs.draws:
        temperature = torch.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        policy = logits / temperature
    candidates = policy
    if needs.penalises:
        penalty = rows.penalty[:, None]
        candidates = torch.where(rows.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        candidates = candidates / temperature if needs.draws else candidates
    if needs.bans:
        candidates = candidates.scatter_add(1, rows.banned, rows.ban)
    tokens = candidates.argmax(-1)
    if needs.draws:
        probabilities = candidates.softmax(-1)
        if needs.truncates:
            probabilities = _truncate(probabilities, rows)
        drawn = _invert(probabilities.cumsum(-1), uniform(rows.seeds, rows.draws))
        tokens = torch.where(rows.temperature > 0, drawn, tokens)
    tokens = torch.where(rows.forced >= 0, rows.forced, tokens)
    return tokens, token_log_probs(policy, tokens)


def _truncate(probabilities: torch.Tensor, rows: RowSettings) -> torch.Tensor:
    """Zero all but a row's most likely tokens: at most `top_k`, and of these the ones before which `top_p` is not yet reached."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(ordered.shape[-1], device=ordered.device)
    kept = (rows.top_k[:, None] == 0) | (place < rows.top_k[:, None])
    cumulative = ordered.where(kept, 0.0).cumsum(-1)
    kept &= cumulative - ordered < rows.top_p[:, None] * cumulative[:, -1:]
    # Back in the vocabulary's order: a row that keeps all draws what it would draw among rows that cut nothing off.
    return probabilities.where(torch.empty_like(kept).scatter_(-1, order, kept), 0.0)


def _invert(cumulative: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose cumulative weight is above `numbers` in [0, 1) times the whole weight."""
    total = cumulative[:, -1]
    # Rounding may bring the product up to the whole, above which no place is.
    target = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)
