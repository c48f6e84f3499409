"""Generalised advantage estimation over packed responses: one reverse scan a segment.

    delta[t] = rewards[t] + gamma values[t + 1] - values[t]
    advantages[t] = delta[t] + gamma lam advantages[t + 1]          returns[t] = advantages[t] + values[t]

Beyond a segment's last token the advantage is 0, and the value is the segment's bootstrap: 0 where the response has ended, the
critic's value of what comes next where it was cut. Forward only: advantages and returns are targets.

Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
"""

import torch

from step_kernels import native, registry
from step_kernels.operators import operator

OP = "gae_varlen"
registry.register(OP, cuda=(torch.float32,), cpp=(torch.float32,))


def gae_varlen_reference(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the op token by token; every backend is tested against this, in float64.

    Args:
        rewards, values: `[tokens]`, segments packed back to back.
        cu_seqlens: `[segments + 1]` int32, `cu_seqlens[0] == 0`, non-decreasing, last = tokens.
        gamma, lam: discount, and the weight of longer estimates.
        bootstrap: `[segments]`, the value after each segment's last token; zeros when None.

    Returns:
        advantages and returns, `[tokens]`.
    """
    advantages = torch.zeros_like(values)
    bounds = cu_seqlens.tolist()
    for segment, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        next_value = values.new_zeros(()) if bootstrap is None else bootstrap[segment]
        advantage = values.new_zeros(())
        for t in range(end - 1, start - 1, -1):
            advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage
            advantages[t], next_value = advantage, values[t]
    return advantages, advantages + values


def gae_varlen(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of packed segments; arguments and results as in `gae_varlen_reference`. Never waits for the device.

    Raises:
        ValueError: if the shapes or dtypes disagree, or an input requires gradients: the op is forward only.
    """
    if rewards.dim() != 1 or rewards.shape != values.shape or rewards.dtype != values.dtype:
        raise ValueError(f"{OP}: rewards {_describe(rewards)} and values {_describe(values)} must be alike, one number a token")
    segments = cu_seqlens.numel() - 1
    if bootstrap is not None and (bootstrap.shape != (segments,) or bootstrap.dtype != values.dtype):
        raise ValueError(f"{OP}: bootstrap {_describe(bootstrap)} must have one {values.dtype} for each of {segments} segments")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rewards, values, bootstrap)):
        raise ValueError(f"{OP} is forward only: advantages and returns are targets; detach rewards and values")
    return _op(rewards, values, cu_seqlens, bootstrap, gamma, lam)


@operator("step::gae_varlen")
def _op(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    bootstrap: torch.Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if bootstrap is None:
        bootstrap = values.new_zeros(cu_seqlens.numel() - 1)
    if registry.backend(OP, values) == "torch":
        return _torch(rewards, values, cu_seqlens, bootstrap, gamma, lam)
    advantages, returns = values.new_empty(values.shape), values.new_empty(values.shape)
    inputs = [x.contiguous() for x in (rewards, values, cu_seqlens, bootstrap)]
    native.ops().gae_varlen(*inputs, gamma, lam, advantages, returns)
    return advantages, returns


@_op.register_fake
def _(rewards, values, cu_seqlens, bootstrap, gamma, lam):
    return values.new_empty(values.shape), values.new_empty(values.shape)


def _torch(rewards, values, cu_seqlens, bootstrap, gamma, lam):
    """The scan by doubling: after `k` rounds every token has summed the 2^k deltas from itself on that its segment holds."""
    tokens, decay, reach = len(values), gamma * lam, 1
    numbers = torch.arange(len(bootstrap), device=values.device)
    segment = torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=tokens)
    next_values = bootstrap[segment]
    next_values[:-1] = torch.where(segment[1:] == segment[:-1], values[1:], next_values[:-1])
    advantages = rewards + gamma * next_values - values
    while reach < tokens:
        further = torch.where(segment[reach:] == segment[:-reach], advantages[reach:], 0)
        advantages = torch.cat([advantages[:-reach] + decay * further, advantages[-reach:]])
        decay, reach = decay * decay, 2 * reach
    return advantages, advantages + values


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def cuda_kernels():
    """What the ahead-of-time inspection looks at, see `step_kernels.inspect`: 256 responses of 2,048 tokens."""
    tokens, segments = 256 * 2048, 256
    # Four numbers a token, and the bootstraps; a scan by tiles costs about 16 operations a token.
    yield f"{OP}.gae_scan {segments} x 2048", "gae.cu", "gae_scan", 0, 16 * tokens, 16 * tokens + 8 * segments
