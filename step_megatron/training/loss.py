"""The loss of a step: the mean over every trained token of the step, wherever it was computed.

    L = sum_i m_i l_i / sum_i m_i        over all tokens i of all micro-batches of all ranks

A mean of the micro-batches' means would weigh a token of a short reply more than one of a long reply (packed micro-batches hold
very different numbers of trained tokens). Megatron divides once, at the end: with `calculate_per_token_loss` each micro-batch
hands its sum and its count to the schedule, gradients accumulate the sums, and `finalize_model_grads` divides by the count over
all ranks.

Source: equation 1 of the Step-Audio-R1.5 report (the weights of the mixture are in the data, not in the loss).
"""

import torch


def masked_loss(
    output: tuple[torch.Tensor, torch.Tensor], loss_mask: torch.Tensor, group: torch.Tensor, groups: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of the trained tokens in the form that Megatron's schedules take for a per-token mean.

    Args:
        output: the model's: the summed loss of the trained tokens, with gradient, and the loss of each predicted token of this
            rank (of its slice, under context parallelism), `[1, n]`, without.
        loss_mask: `[1, n]` float, 1 where the token is trained.
        group: `[n]` int64, what each token's loss is summed with (`aspects.LossGroup`); anything valid where the mask is 0.
        groups: number of groups.

    Returns:
        The summed loss (with gradient), the number of trained tokens (int32), and a report: `sums`, `[groups, 2]` float64, loss
        sum and token count of each group, and `losses` as they came in. All of it stays on the device.
    """
    total, losses = output
    sums = torch.zeros(groups, 2, dtype=torch.float64, device=losses.device)
    values = torch.stack(((losses * loss_mask).flatten(), loss_mask.flatten()), dim=1).double()
    sums.index_add_(0, group, values)
    return total, loss_mask.sum().to(torch.int32), {"sums": sums, "losses": losses.detach()}
