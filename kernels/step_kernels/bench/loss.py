"""Cases of the output layer with its loss: time and extra peak memory beside eager torch, forward and backward.

A loss may be no slower than eager; log-probabilities with entropy, which compute the logits twice, at most 1.4 times as slow.
Both may use 15% of eager's extra memory, which is what comes above inputs, weights and the gradients that come out. A loss in
float16, on a GPU only, computes the logits twice too: no limit of time is set for it, the same of memory.
"""

from collections.abc import Callable

import torch

from step_kernels import linear_cross_entropy, linear_log_probs
from step_kernels.bench.contestants import compiled, library, ours
from step_kernels.bench.harness import Absent, Case, Contestant, Work
from step_kernels.linear_cross_entropy import linear_cross_entropy_reference, linear_log_probs_reference

_MEMORY = 0.15
_VOCABULARY = 158_720
# (tokens, width): on two cores a round of the contestants takes about 10 s, of log-probabilities 20 s, and everybody runs twice
# before the first, for the results and for the memory: five minutes in all. At 4,096 tokens a wider model would only add to the
# matrix products, which are the same library's on all sides.
_SIZES = ((1024, 576), (4096, 128))
_ROUNDS = 3
# Copies of the logits that eager holds at its peak (3 and 5), and one to spare.
_COPIES = {"loss": 4, "log-probabilities": 6}


class _Batch:
    def __init__(self, tokens: int, width: int, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
        self.weight = (torch.randn(_VOCABULARY, width, generator=generator) * width**-0.5).to(device, dtype).requires_grad_()
        self.labels = torch.randint(_VOCABULARY, (tokens,), generator=generator).to(device)
        self.gradients = torch.randn(2, tokens, generator=generator).to(device)

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight

    def loss(self, function: Callable) -> Work:
        def work():
            total, _ = function(self.hidden, self.weight, self.labels)
            return [total, *torch.autograd.grad(total, self.leaves)]

        return work

    def log_probs(self, function: Callable) -> Work:
        def work():
            results = function(self.hidden, self.weight, self.labels)
            return [*results, *torch.autograd.grad(results, self.leaves, tuple(self.gradients))]

        return work

    def liger(self) -> Work:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return self.loss(lambda hidden, weight, labels: (fused(weight, hidden, labels), None))


def _fits(needed: int, device: torch.device, contestant: Contestant) -> Contestant:
    """Leave a contestant out where eager's copies of the logits do not fit: the machine would swap, or kill somebody."""

    def prepare() -> Work:
        if device.type == "cpu":
            with open("/proc/meminfo") as file:
                free = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
            if free < needed:
                raise Absent(f"needs {needed >> 30} GiB, {free >> 30} are free")
        return contestant.prepare()

    return Contestant(contestant.name, prepare, contestant.limit, contestant.memory_limit)


def loss_cases(device: torch.device) -> list[Case]:
    """Both modes at 1,024 and 4,096 tokens, with the vocabulary of the 32B model."""
    cases = []
    for tokens, width in _SIZES:
        batch = _Batch(tokens, width, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
        for mode, wrap, op, plain, limit in (
            ("loss", batch.loss, linear_cross_entropy, linear_cross_entropy_reference, 1.0),
            ("log-probabilities", batch.log_probs, linear_log_probs, linear_log_probs_reference, 1 / 1.4),
        ):
            needed = _COPIES[mode] * 4 * tokens * _VOCABULARY
            eager = Contestant("eager", lambda wrap=wrap, plain=plain: wrap(plain), limit, _MEMORY)
            contestants = [*ours("linear_cross_entropy", wrap(op), device), _fits(needed, device, eager)]
            if tokens == _SIZES[0][0]:  # it is there to be known, and takes as long as eager
                contestants.append(_fits(needed, device, compiled(plain, (), None, wrap)))
            if mode == "loss":
                contestants.append(library("Liger", "liger_kernel", batch.liger, device))
            shape = f"{tokens} x {width} x {_VOCABULARY}, {mode}, forward + backward"
            tolerance = 1e-3 if device.type == "cpu" else 3e-2
            cases.append(Case("linear-cross-entropy", shape, contestants, tolerance, memory=True, rounds=_ROUNDS))
    if device.type == "cuda":
        cases.append(_float16_case(device))
    return cases


def _float16_case(device: torch.device) -> Case:
    tokens, width = _SIZES[0]
    batch = _Batch(tokens, width, device, torch.float16)
    eager = Contestant("eager", lambda: batch.loss(linear_cross_entropy_reference), None, _MEMORY)
    contestants = [*ours("linear_cross_entropy", batch.loss(linear_cross_entropy), device), eager]
    shape = f"{tokens} x {width} x {_VOCABULARY} in float16, loss, forward + backward"
    return Case("linear-cross-entropy", shape, contestants, 3e-2, memory=True, rounds=_ROUNDS)


CASES = {"linear-cross-entropy": loss_cases}
