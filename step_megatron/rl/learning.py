"""What models say of an experience, and what they learn from it: forward passes and optimizer steps by Megatron's schedules."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.config.rl import PPOConfig
from step_megatron.model.batch import TokenScores
from step_megatron.rl.batching import ResponseBatch
from step_megatron.rl.ppo import Loss, policy_loss, value_loss
from step_megatron.rl.rollout import Experience
from step_megatron.runtime.device import Runtime
from step_megatron.training.loop import run_schedule
from step_megatron.training.optimizer import apply_update, gradient_norm
from step_megatron.training.schedule import learning_rate
from step_megatron.training.state import TrainState

# Of a micro-batch and what the model says of it, the loss.
LossOf = Callable[[ResponseBatch, TokenScores], Loss]


@torch.no_grad()
def score(
    model: Sequence[torch.nn.Module],
    batches: Sequence[ResponseBatch],
    tokens: int,
    runtime: Runtime,
    group: dist.ProcessGroup,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """What a model says of the experience's tokens; every rank calls this.

    Args:
        model: this rank's chunks, wrapped or not.
        batches: this replica's.
        tokens: of the experience.
        group: a gloo group of all ranks.

    Returns:
        `log_probs` (or `values`, or both, as the model has heads), `[tokens]` float32 on the host, the same bits on every rank;
        zero for tokens that are in no micro-batch.
    """

    def scores_of(batch: ResponseBatch) -> Callable:
        def told(scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            said = {name: value for name, value in scores._asdict().items() if len(value)}
            return batch.counts.sum().float(), batch.counts.sum().to(torch.int32), said

        return told

    reports = run_schedule(list(model), batches, scores_of, forward_only=True, beat=beat)
    heads = [report.keys() for report in reports]
    names = _agree(sorted(heads[0]) if heads else [], group)
    scored = {name: torch.zeros(tokens) for name in names}
    # One rank of each tensor-parallel group speaks; every token is counted by one replica and one context-parallel rank.
    for batch, report in zip(batches, reports, strict=True) if reports and runtime.tp_rank == 0 else ():
        counts = batch.counts.cpu()
        for name, value in report.items():
            scored[name][batch.place[counts]] = value.detach().float().cpu()[counts]
    for value in scored.values():
        dist.all_reduce(value, group=group)
    return scored


def _agree(names: list[str], group: dist.ProcessGroup) -> list[str]:
    """The names that the last stages have, on every rank."""
    told: list[list[str]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(told, names, group=group)
    return max(told, key=len)


def actor_loss(experience: Experience, ppo: PPOConfig, beta: float, weights: torch.Tensor | None) -> LossOf:
    """The policy's loss; `weights` are truncated importance weights, `[tokens]`."""

    def loss(batch: ResponseBatch, scores: TokenScores) -> Loss:
        return policy_loss(
            scores.log_probs,
            batch.of(experience.old),
            batch.of(experience.advantages),
            batch.counts,
            ppo,
            beta,
            scores.entropy if len(scores.entropy) else None,
            batch.of(experience.reference),
            None if weights is None else batch.of(weights),
        )

    return loss


def critic_loss(experience: Experience, ppo: PPOConfig) -> LossOf:
    """The critic's loss."""

    def loss(batch: ResponseBatch, scores: TokenScores) -> Loss:
        old, returns = batch.of(experience.values), batch.of(experience.returns)
        return value_loss(scores.values, old, returns, batch.counts, ppo.value_clip)

    return loss


def shared_loss(actor: LossOf, critic: LossOf, coefficient: float) -> LossOf:
    """Of a policy and a critic on one trunk."""

    def loss(batch: ResponseBatch, scores: TokenScores) -> Loss:
        of_actor, of_critic = actor(batch, scores), critic(batch, scores)
        return Loss(of_actor.total + coefficient * of_critic.total, of_actor.count, of_actor.sums | of_critic.sums)

    return loss


@dataclass
class Learner:
    """A model that learns, and what its steps since `flush` came to.

    Attributes:
        state: model, optimizer, schedule.
        group: a gloo group of all ranks.
        skipped: steps without an update: the gradient was not finite, or overflowed.
    """

    state: TrainState
    runtime: Runtime
    group: dist.ProcessGroup
    skipped: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _norm: float = math.nan

    @property
    def model(self) -> list[Any]:
        return self.state.model

    def step(self, batches: Sequence[ResponseBatch], loss_of: LossOf, beat: Callable[[], None] = lambda: None) -> None:
        """One optimizer step over this replica's micro-batches; every rank calls this."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.state.optimizer.zero_grad()

        def told(batch: ResponseBatch) -> Callable:
            def loss(scores: TokenScores) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
                made = loss_of(batch, scores)
                return made.total, made.count.to(torch.int32), made.sums | {"tokens": made.count}

            return loss

        reports = run_schedule(self.model, batches, told, beat=beat)
        self.state.scheduler.step(1)
        norm = gradient_norm(self.state.optimizer)
        finite = norm is not None and math.isfinite(norm)
        if finite:
            apply_update(self.state.optimizer, norm)
        self.skipped += not finite
        self._norm = math.nan if norm is None else norm
        for name, value in self._totals(reports).items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def flush(self) -> tuple[dict[str, float], float, float]:
        """Sums over the tokens of all steps since the last call, with `tokens`; gradient norm and learning rate of the last."""
        sums, self._sums = self._sums, {}
        return sums, self._norm, learning_rate(self.state.optimizer)

    def _totals(self, reports: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
        names = _agree(sorted(reports[0]) if reports else [], self.group)
        speaks = bool(reports) and self.runtime.tp_rank == 0
        totals = torch.zeros(len(names), dtype=torch.float64)
        for report in reports if speaks else ():
            totals += torch.stack([report[name].double() for name in names]).cpu()
        dist.all_reduce(totals, group=self.group)
        return dict(zip(names, totals.tolist(), strict=True))
