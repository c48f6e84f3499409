"""The loss counts tokens, not micro-batches, and reports each source's share exactly."""

import torch
from step_kernels import linear_cross_entropy

from step_megatron.training.loss import masked_loss


def test_equals_a_hand_loop_over_tokens_with_very_unequal_micro_batches():
    generator = torch.Generator().manual_seed(0)
    shapes = [(500, 1), (40, 39), (7, 7)]  # tokens, trained tokens
    total, count, by_source = 0.0, 0, torch.zeros(3, 2, dtype=torch.float64)
    hand = {source: [] for source in range(3)}
    for tokens, trained in shapes:
        losses = torch.rand(1, tokens, generator=generator) * trained  # micro-batches of different mean
        mask = torch.zeros(1, tokens)
        mask[0, torch.randperm(tokens, generator=generator)[:trained]] = 1
        source = torch.randint(0, 3, (tokens,), generator=generator)
        for index in range(tokens):
            if mask[0, index]:
                hand[int(source[index])].append(losses[0, index].item())
        summed, number, report = masked_loss(((losses * mask).sum(), losses), mask, source, 3)
        total, count, by_source = total + summed.item(), count + number.item(), by_source + report["sums"]
    everything = [value for values in hand.values() for value in values]
    assert count == len(everything)
    mean = sum(everything) / len(everything)
    assert abs(total / count - mean) < 1e-5 * mean
    for index, values in hand.items():
        assert by_source[index, 1] == len(values)
        torch.testing.assert_close(by_source[index, 0], torch.tensor(values, dtype=torch.float64).sum(), rtol=1e-6, atol=0)


def test_masked_tokens_have_no_gradient():
    hidden, weight = torch.rand(6, 4, requires_grad=True), torch.rand(9, 4)
    mask = torch.tensor([[0.0, 1, 0, 1, 1, 0]])
    output = linear_cross_entropy(hidden, weight, torch.arange(6), mask[0])
    masked_loss(output, mask, torch.zeros(6, dtype=torch.int64), 1)[0].backward()
    assert hidden.grad.any(1).tolist() == mask[0].bool().tolist()
