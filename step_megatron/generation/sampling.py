"""Logits to tokens, for a batch whose rows have settings of their own; nothing is read back to the host.

A row's random number is a hash of its seed and of how many it has drawn, so it depends on nothing else in the batch, and a sample
that starts again needs no state.
"""

from dataclasses import dataclass

import torch
from step_kernels import draw_tokens
from step_kernels.softmax_rows import token_log_probs


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
    candidates = logits
    if needs.penalises:
        penalty = rows.penalty[:, None]
        candidates = torch.where(rows.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if needs.bans:
        candidates = candidates.scatter_add(1, rows.banned, rows.ban)
    if needs.truncates and needs.draws:
        candidates = _truncate(candidates, rows)
    tokens, logprobs = draw_tokens(candidates, rows.temperature, rows.seeds, rows.draws, rows.forced, needs.draws)
    if candidates is not logits:
        logprobs = token_log_probs(logits / _divisor(rows), tokens)
    return tokens, logprobs


def _divisor(rows: RowSettings) -> torch.Tensor:
    return torch.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]


def _truncate(logits: torch.Tensor, rows: RowSettings) -> torch.Tensor:
    """Leave a row's most likely tokens: at most `top_k`, and of these the ones before which `top_p` is not yet reached.

    A row that cuts nothing off stays as it is, and draws what it would draw among others like it.
    """
    ordered, order = (logits / _divisor(rows)).softmax(-1).sort(dim=-1, descending=True, stable=True)
    place = torch.arange(ordered.shape[-1], device=ordered.device)
    kept = (rows.top_k[:, None] == 0) | (place < rows.top_k[:, None])
    cumulative = ordered.where(kept, 0.0).cumsum(-1)
    kept &= (rows.top_p[:, None] >= 1) | (cumulative - ordered < rows.top_p[:, None] * cumulative[:, -1:])
    return logits.masked_fill(~torch.empty_like(kept).scatter_(-1, order, kept), float("-inf"))
