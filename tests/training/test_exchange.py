"""What all ranks learn of a step: sums over ranks, the first rank's norm, any rank's signal; the same bits everywhere."""

import math
import signal

import pytest
import torch


def exchanged(rank, world_size, *, norms, signals):
    import torch.distributed as dist

    from step_megatron.config.schema import Config, RunConfig
    from step_megatron.runtime.device import initialize
    from step_megatron.training.exchange import exchange, start_copy_to_host

    initialize(Config(run=RunConfig(threads=1)))
    sums = start_copy_to_host(torch.tensor([[0.1 + rank, 1.0], [10.0 * rank, 2.0 * rank]], dtype=torch.float64))
    facts = exchange(sums, norms[rank], signals[rank], dist.group.WORLD)
    return facts.sums.tolist(), facts.loss, facts.gradient_norm, facts.signal


@pytest.mark.parametrize(
    ("norms", "signals", "norm", "number"),
    [
        ((1.5, 1.5000001), (0, 0), 1.5, 0),
        ((2.0, 2.0), (0, signal.SIGTERM), 2.0, signal.SIGTERM),
        ((None, None), (signal.SIGHUP, 0), None, signal.SIGHUP),
        ((math.nan, math.nan), (0, 0), math.nan, 0),
        ((math.inf, 3.0), (0, 0), math.inf, 0),
        ((3.0, math.nan), (0, 0), 3.0, 0),
    ],
)
def test_every_rank_knows_the_same(norms, signals, norm, number, worker_pool):
    first, second = worker_pool(2).run(exchanged, {"norms": norms, "signals": signals})
    assert repr(first) == repr(second)
    sums, loss, gradient_norm, told = first
    assert sums == [[1.2000000000000002, 2.0], [10.0, 2.0]] and loss == pytest.approx(11.2 / 4) and told == number
    assert gradient_norm is None if norm is None else gradient_norm == pytest.approx(norm, nan_ok=True)
