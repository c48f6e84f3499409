"""Packed responses: the one layout of everything that RL computes on, and sums over it that ranks can add up.

The response tokens of all samples stand back to back, without prompts and without padding: `[tokens]` for what belongs to a
token, `[samples]` for what belongs to a response, and `cu_seqlens` `[samples + 1]` int32 between them. A boolean mask over tokens
says which ones count; what stands where it is false may be anything, NaN included, and changes neither a value nor a gradient.
"""

import torch
import torch.distributed as dist


def spread(values: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """One value of every token, from one of every sample: `[samples]` -> `[tokens]`.

    Args:
        tokens: `cu_seqlens[-1]`, which the host knows; so nothing waits for the device.
    """
    return torch.repeat_interleave(values, cu_seqlens.diff(), output_size=tokens)


def on_last_token(values: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[tokens]` zeros, but each sample's value on its last token; that of an empty response is nowhere."""
    zeros = torch.zeros(tokens, dtype=values.dtype, device=values.device)
    if not tokens:
        return zeros
    # An empty response points at another sample's token, so it adds zero there.
    last = (cu_seqlens[1:] - 1).clamp(min=0).long()
    return zeros.index_add(0, last, torch.where(cu_seqlens.diff() > 0, values, 0))


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values where the mask is true, zeros elsewhere; no gradient and no NaN comes through the zeros."""
    return torch.where(mask, values, 0)


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the mask, a scalar."""
    return masked(values, mask).sum()


def moments(values: torch.Tensor, mask: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Count, mean and summed squared deviation of the masked values, `[3]` float64; of all ranks' where a group is given.

    Squares are of deviations from the common mean (two small messages over ranks), so nothing is lost to cancellation.
    """
    values = masked(values.detach().double(), mask)
    first = torch.stack((mask.sum().double(), values.sum()))
    if group is not None:
        dist.all_reduce(first, group=group)
    count, total = first
    mean = total / count.clamp(min=1)
    deviation = masked((values - mean).square(), mask).sum()
    if group is not None:
        dist.all_reduce(deviation, group=group)
    return torch.stack((count, mean, deviation))


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    of: torch.Tensor | None = None,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the masked values, zero elsewhere; the variance is the unbiased one.

    Args:
        group: ranks over which mean and variance are taken, so that no layout changes them.
        of: `moments` taken before, such as those of a whole batch that is whitened in parts; then no rank waits for another.
        shift_mean: whether the mean is taken off.

    One masked value has no variance: it becomes zero (with `shift_mean`).
    """
    count, mean, deviation = moments(values, mask, group) if of is None else of
    scale = (deviation / (count - 1).clamp(min=1) + epsilon).rsqrt()
    whitened = (values.double() - mean * shift_mean) * scale
    return masked(whitened, mask).to(values.dtype)
