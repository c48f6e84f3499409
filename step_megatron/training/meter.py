"""Sums up what the steps did between two lines of metrics; reading the sums back is the only host synchronisation of the loop.

A line holds, for the steps since the line before:

    loss, loss/SOURCE        mean per trained token, over all replicas
    learning_rate, grad_norm of the last step
    tokens_per_second        packed tokens that are not padding, over all replicas; audio_seconds_per_second likewise
    padding_share            padding / all tokens computed
    step_seconds, peak_memory_gib (largest rank), model_flops_per_second, mfu (where the device's peak is known)
    failed_clips, skipped_updates
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from step_megatron.runtime.device import Runtime
from step_megatron.runtime.flops import model_flops_utilisation
from step_megatron.runtime.metrics import peak_memory_bytes
from step_megatron.training.batch import TrainingBatch

# Encoder frames of one second of audio.
_FRAME_RATE = 25.0


class Meter:
    """Running sums of one rank; `flush` is collective.

    Args:
        sources: names of the mixture's sources.
        runtime: where this rank stands; each count is contributed by one rank of a replica.
        flops: floating-point operations, forward and backward, that the model needs for a micro-batch.
        peak: of one device, per second; None when unknown.
    """

    def __init__(
        self, sources: Sequence[str], runtime: Runtime, flops: Callable[[TrainingBatch], float], peak: float | None = None
    ):
        self._sources, self._runtime, self._flops, self._peak = tuple(sources), runtime, flops, peak
        self._reset()

    def _reset(self) -> None:
        self._losses = torch.zeros(len(self._sources), 2, dtype=torch.float64, device=self._runtime.device)
        self._tokens = self._padding = self._frames = self._failed = self._skipped = self._steps = 0
        self._operations = self._seconds = 0.0
        self._gradient_norm = 0.0

    def add(
        self,
        batches: list[TrainingBatch],
        reports: list[dict[str, torch.Tensor]],
        gradient_norm: float | None,
        updated: bool,
        seconds: float,
    ) -> None:
        """Add one step: its micro-batches, the schedule's reports, the gradient norm and its seconds on the host."""
        for report in reports:
            self._losses += report["sums"]
        for batch in batches:
            self._tokens += batch.tokens
            self._padding += batch.padding
            self._frames += batch.audio_frames
            self._failed += batch.failed
            self._operations += self._flops(batch)
        self._steps += 1
        self._skipped += not updated
        self._gradient_norm = float(gradient_norm or 0.0)
        self._seconds += seconds

    def reduce_losses(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Losses of one forward pass over all ranks, without touching the running sums."""
        sums = torch.zeros_like(self._losses)
        for report in reports:
            sums += report["sums"]
        return self._named(self._over_all_ranks(sums))

    def flush(self, learning_rate: float) -> dict[str, float | None]:
        """One line of metrics over all ranks, and start again from zero. Every rank calls this and gets the same line."""
        values = self._named(self._over_all_ranks(self._losses))
        runtime = self._runtime
        one_of_replica = runtime.tp_rank == runtime.cp_rank == runtime.pp_rank == 0
        counts = [self._tokens, self._padding, self._frames, self._failed, self._operations]
        totals = torch.tensor([count * one_of_replica for count in counts], dtype=torch.float64, device=runtime.device)
        dist.all_reduce(totals)
        slowest = torch.tensor([self._seconds, peak_memory_bytes(runtime.device)], dtype=torch.float64, device=runtime.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        tokens, padding, frames, failed, operations = totals.tolist()
        seconds, memory = slowest.tolist()
        values |= {
            "learning_rate": learning_rate,
            "grad_norm": self._gradient_norm,
            "tokens_per_second": tokens / seconds,
            "audio_seconds_per_second": frames / _FRAME_RATE / seconds,
            "padding_share": padding / (tokens + padding),
            "step_seconds": seconds / self._steps,
            "model_flops_per_second": operations / seconds,
            "peak_memory_gib": memory / 2**30,
            "mfu": model_flops_utilisation(operations, seconds, runtime.world_size, self._peak),
            "failed_clips": failed,
            "skipped_updates": float(self._skipped),
        }
        self._reset()
        return values

    def _over_all_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum `[sources, 2]` over the ranks that hold a distinct part: last stages, one tensor-parallel rank each."""
        if self._runtime.tp_rank:
            sums = torch.zeros_like(sums)
        sums = sums.clone()
        dist.all_reduce(sums)
        return sums.cpu()

    def _named(self, sums: torch.Tensor) -> dict[str, float]:
        rows = [("loss", sums.sum(0)), *((f"loss/{name}", row) for name, row in zip(self._sources, sums, strict=True))]
        return {name: (row[0] / row[1]).item() for name, row in rows if row[1] > 0}
