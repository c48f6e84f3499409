"""What the ranks tell each other in a step, between its gradients and its update: one all-reduce of a few numbers in host memory.

Whatever all ranks have to decide alike (to stop on a signal, to leave out an update) depends on these values alone, and they are
the same bits on every rank; so is the sum of the losses, which can be kept on every rank and goes into a checkpoint as it is.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from step_megatron.training.interruption import SIGNALS


@dataclass(frozen=True)
class StepFacts:
    """What all ranks know of a step.

    Attributes:
        sums: `[groups, 2]` float64 on the host: loss sum and trained tokens of each group, over all ranks.
        gradient_norm: before clipping; None where scaled gradients overflowed, which Megatron answers with a smaller loss scale.
        signal: number of a signal that some rank was sent, else 0.
    """

    sums: torch.Tensor
    gradient_norm: float | None
    signal: int

    @property
    def loss(self) -> float:
        """Mean loss of a trained token; NaN where the step has none."""
        total, tokens = self.sums.sum(0).tolist()
        return total / tokens if tokens else math.nan


def start_copy_to_host(sums: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that is complete when the host next waits for the device, as Megatron's gradient norm makes it do."""
    if sums.device.type == "cpu":
        return sums
    return torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)


def exchange(sums: torch.Tensor, gradient_norm: float | None, signal: int, group: dist.ProcessGroup) -> StepFacts:
    """Every rank calls this once a step.

    Args:
        sums: `[groups, 2]` float64 on the host, of what this rank alone counts.
        gradient_norm: Megatron's, over all ranks already; rank 0's is the one that counts, for another replica's may differ in
            its last bit where its ranks added it up in another order.
        signal: number of the signal that this rank was sent, or 0.
        group: a gloo group of all ranks.
    """
    norm = [0.0, 0.0]
    if dist.get_rank(group) == 0:
        norm = [0.0, 1.0] if gradient_norm is None else [gradient_norm, 0.0]
    signals = [float(signal == number) for number in SIGNALS]
    facts = torch.cat([sums.flatten(), torch.tensor(norm + signals, dtype=torch.float64)])
    dist.all_reduce(facts, group=group)
    norm_of_all, overflowed, *told = facts[sums.numel() :].tolist()
    heard = [number for number, count in zip(SIGNALS, told, strict=True) if count]
    return StepFacts(facts[: sums.numel()].view_as(sums), None if overflowed else norm_of_all, heard[0] if heard else 0)
