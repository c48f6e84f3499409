"""Sums up what the steps did between two lines of metrics.

A line holds, for the steps since the line before:

    loss, loss/SOURCE        mean per trained token, over all replicas; without the steps that were anomalies
    aspect_loss/ASPECT       the same over the samples of one aspect, aspect_loss/ASPECT.KIND of one kind of it
    learning_rate, grad_norm of the last step; loss_scale where there is one
    tokens_per_second        packed tokens that are not padding, over all replicas; audio_seconds_per_second likewise
    padding_share            padding / all tokens computed
    step_seconds, peak_memory_gib (largest rank), model_flops_per_second, mfu (where the device's peak is known)
    failed_clips, skipped_updates (overflows and anomalies)
    anomalies                steps out of order since the run began (`training.anomalies`)
    samples_left_out         samples of the training sources that cannot be trained on, found since the run began
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.data.aspects import LossGroup
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.flops import model_flops_utilisation
from step_megatron.runtime.metrics import peak_memory_bytes
from step_megatron.training.batch import TrainingBatch
from step_megatron.training.exchange import StepFacts

# Encoder frames of one second of audio.
_FRAME_RATE = 25.0
# Summed over all ranks.
_COUNTS = ("tokens", "padding", "frames", "failed", "operations")


class Meter:
    """Running sums of one rank; `flush` is collective.

    Args:
        groups: what losses are summed by.
        runtime: where this rank stands; each count is contributed by one rank of a replica.
        flops: floating-point operations, forward and backward, that the model needs for a micro-batch.
        peak: of one device, per second; None when unknown.
        encoder_flops: operations of what this rank encoded inside the latest training step.
        samples_left_out: how many samples cannot be trained on; the same on every rank.
        anomalies: how many steps were out of order; the same on every rank.
        loss_scale: that of the next step; None where losses are not scaled.
    """

    def __init__(
        self,
        groups: Sequence[LossGroup],
        runtime: Runtime,
        flops: Callable[[TrainingBatch], float],
        peak: float | None = None,
        encoder_flops: Callable[[], float] = lambda: 0.0,
        samples_left_out: Callable[[], int] = lambda: 0,
        anomalies: Callable[[], int] = lambda: 0,
        loss_scale: Callable[[], float] | None = None,
    ):
        self._groups, self._runtime, self._flops, self._peak = tuple(groups), runtime, flops, peak
        self._encoder_flops, self._samples_left_out, self._anomalies = encoder_flops, samples_left_out, anomalies
        self._loss_scale = loss_scale
        self._reset()

    def _reset(self) -> None:
        # The same on every rank; the counts are this rank's own.
        self._losses = torch.zeros(len(self._groups), 2, dtype=torch.float64)
        self._counts = dict.fromkeys(_COUNTS, 0.0)
        self._encoder_operations = self._seconds = self._gradient_norm = 0.0
        self._skipped = self._steps = 0

    def add(self, batches: list[TrainingBatch], facts: StepFacts, updated: bool, anomalous: bool, seconds: float) -> None:
        """Add one step: its micro-batches, what all ranks know of it, what became of it, and its seconds on the host."""
        if not anomalous:
            self._losses += facts.sums
        for batch in batches:
            self._counts["tokens"] += batch.tokens
            self._counts["padding"] += batch.padding
            self._counts["frames"] += batch.audio_frames
            self._counts["failed"] += len(batch.failed)
            self._counts["operations"] += self._flops(batch)
        self._encoder_operations += self._encoder_flops()
        self._steps += 1
        self._skipped += not updated
        self._gradient_norm = float(facts.gradient_norm or 0.0)
        self._seconds += seconds

    def local_sums(self, reports: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Sum of the reports, `[groups, 2]` float64 on the device, on the ranks that hold a distinct part of the losses: last
        stages, one tensor-parallel rank each. Zero on the others.
        """
        sums = torch.zeros(len(self._groups), 2, dtype=torch.float64, device=self._runtime.device)
        for report in reports if self._runtime.tp_rank == 0 else ():
            sums += report["sums"]
        return sums

    def reduce_losses(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Losses of one forward pass over all ranks, without touching the running sums."""
        sums = self.local_sums(reports)
        dist.all_reduce(sums)
        return self._named(sums.cpu())

    def flush(self, learning_rate: float) -> dict[str, float | None]:
        """One line of metrics over all ranks, and start again from zero. Every rank calls this and gets the same line."""
        values = self._named(self._losses)
        tokens, padding, frames, failed, operations = self._totals()
        seconds, memory = self._largest(self._seconds, peak_memory_bytes(self._runtime.device))
        values |= {
            "learning_rate": learning_rate,
            "grad_norm": self._gradient_norm,
            "tokens_per_second": tokens / seconds,
            "audio_seconds_per_second": frames / _FRAME_RATE / seconds,
            "padding_share": padding / (tokens + padding),
            "step_seconds": seconds / self._steps,
            "model_flops_per_second": operations / seconds,
            "peak_memory_gib": memory / 2**30,
            "mfu": model_flops_utilisation(operations, seconds, self._runtime.world_size, self._peak),
            "failed_clips": failed,
            "skipped_updates": float(self._skipped),
            "samples_left_out": float(self._samples_left_out()),
            "anomalies": float(self._anomalies()),
        }
        if self._loss_scale is not None:
            values["loss_scale"] = self._loss_scale()
        self._reset()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The running sums over all ranks, as plain values; every rank calls this and gets the same.

        With them in a checkpoint, the line after a stop covers all of its steps, those before the stop too.
        """
        return {
            "losses": dict(zip(map(str, self._groups), self._losses.tolist(), strict=True)),
            "counts": dict(zip(_COUNTS, self._totals(), strict=True)),
            "seconds": self._largest(self._seconds)[0],
            "gradient_norm": self._gradient_norm,
            "skipped": self._skipped,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums, on any number of ranks; those of a group that is no more are dropped."""
        self._reset()
        self._seconds, self._gradient_norm = state["seconds"], state["gradient_norm"]
        self._skipped, self._steps = state["skipped"], state["steps"]
        rows = [state["losses"].get(str(group), [0.0, 0.0]) for group in self._groups]
        self._losses += torch.tensor(rows, dtype=torch.float64)
        # Rank 0 is first in every dimension, so what it holds is counted in every layout.
        if self._runtime.rank == 0:
            self._counts = dict(state["counts"])

    def _totals(self) -> list[float]:
        """`_COUNTS` over all ranks: one rank speaks for a replica, but every rank encodes clips of its own."""
        runtime = self._runtime
        one_of_replica = runtime.tp_rank == runtime.cp_rank == runtime.pp_rank == 0
        mine = [count * one_of_replica for count in self._counts.values()]
        mine[_COUNTS.index("operations")] += self._encoder_operations
        totals = torch.tensor(mine, dtype=torch.float64, device=runtime.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def _largest(self, *values: float) -> list[float]:
        """Each value of the rank where it is largest."""
        largest = torch.tensor(values, dtype=torch.float64, device=self._runtime.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def _named(self, sums: torch.Tensor) -> dict[str, float]:
        rows = {"loss": sums.sum(0)}
        for group, row in zip(self._groups, sums, strict=True):
            for name in group.metrics:
                rows[name] = rows.get(name, 0.0) + row
        return {name: (row[0] / row[1]).item() for name, row in rows.items() if row[1] > 0}
