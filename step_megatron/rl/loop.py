"""The loop of PPO: what an iteration does, in order.

encode    the prompts' clips through the frozen encoder, once for everybody who listens
generate  samples of the policy by the rollout engine, with its own weights
judge     replies against references, by rubric or plain preference; verifiable answers; one score a sample
score     log-probabilities before the first update and under the reference, and values, by the training forward
train     passes over the samples in mini-batches: the policy's optimizer steps, then the critic's

Source: section 3.3 and equations 2-5 of the Step-Audio-R1.5 report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from step_megatron.audio.cache import EncodedClip
from step_megatron.audio.encode_once import EncodedAudio
from step_megatron.config.schema import Config
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.mixture import shuffled
from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.data.sources import DataError
from step_megatron.evaluation.files import write_jsonl
from step_megatron.generation.interface import RolloutEngine
from step_megatron.generation.rendering import Rendering
from step_megatron.model.lora import adapters_off
from step_megatron.rl.assessment import assess
from step_megatron.rl.batching import ResponseBatcher
from step_megatron.rl.colocation import Colocation
from step_megatron.rl.judge.phase import Judging
from step_megatron.rl.kl import KLController
from step_megatron.rl.learning import Learner, actor_loss, critic_loss, score, shared_loss
from step_megatron.rl.measuring import Measures
from step_megatron.rl.ppo import importance_weights
from step_megatron.rl.prompt_sampler import PromptSampler
from step_megatron.rl.rewarding import judge, reward
from step_megatron.rl.rewards import Rewards
from step_megatron.rl.rollout import Experience
from step_megatron.rl.sampling import sample
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.seeds import derive
from step_megatron.training.watchdog import Heartbeat

Clips = Mapping[str, EncodedClip]


@dataclass
class PPO:
    """Everything that an iteration needs.

    Attributes:
        group: a gloo group of all ranks.
        engine: generates with the actor's weights.
        critic: None where it is the actor's second head, or the baseline is another.
        reference: the frozen policy; None where it is the actor without its adapters.
        judging: None where no reward needs it.
        iteration: how many are done.
    """

    config: Config
    runtime: Runtime
    group: dist.ProcessGroup
    prompts: PromptSampler
    rendering: Rendering
    lengths: ClipLengths
    audio: EncodedAudio | None
    engine: RolloutEngine
    batcher: ResponseBatcher
    actor: Learner
    critic: Learner | None
    reference: list[torch.nn.Module] | None
    judging: Judging | None
    rewards: Rewards
    kl: KLController
    colocation: Colocation
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    iteration: int = 0

    @property
    def folder(self) -> Path:
        """Where the iteration writes what it must not do twice."""
        return Path(self.config.run.dir) / "iterations" / f"{self.iteration + 1:06d}"


def iterate(ppo: PPO) -> dict[str, float]:
    """One iteration; every rank calls this and gets the same metrics."""
    ppo.heartbeat.next_turn(ppo.iteration + 1)
    prompts = ppo.prompts.draw(ppo.config.rl.rollout.prompts, ppo.iteration)
    with ppo.colocation.phase("encode"):
        ppo.heartbeat.beat("encode")
        prompts, clips = listen(ppo, prompts)
    with ppo.colocation.phase("generate"):
        ppo.heartbeat.beat("generate")
        rollouts = sample(ppo, prompts, clips)
    with ppo.colocation.phase("judge"):
        ppo.heartbeat.beat("judge")
        judgments = judge(ppo, rollouts)
        scores = reward(ppo, prompts, rollouts, judgments)
    measures = Measures(ppo.rewards, rollouts, judgments, scores)
    experience = Experience.of(rollouts)
    experience.valid = scores.valid
    with ppo.colocation.phase("score"):
        ppo.heartbeat.beat("score")
        look_back(ppo, experience, clips, measures)
    measures.kl = assess(experience, scores.values, ppo.config.rl.ppo, ppo.kl.beta)
    learn(ppo, experience, clips)
    metrics = measures.metrics(experience, ppo) | ppo.colocation.flush()
    if ppo.runtime.rank == 0:
        write_jsonl(Path(ppo.config.run.dir) / "rollouts" / f"{ppo.iteration + 1:06d}.jsonl", measures.records())
    ppo.kl.update(measures.kl, int(experience.valid.sum()))
    ppo.engine.weights_changed()
    ppo.iteration += 1
    return metrics


def listen(ppo: PPO, prompts: list[RLPrompt]) -> tuple[list[RLPrompt], Clips]:
    """The prompts whose clips can be read, and the clips.

    Raises:
        DataError: there is none; on every rank.
    """
    if ppo.audio is None:
        return prompts, {}
    clips = ppo.audio.fetch([address for prompt in prompts for address in prompt.conversation.audio_addresses()])
    good = [p for p in prompts if all(clips[address] is not None for address in p.conversation.audio_addresses())]
    if not good:
        raise DataError(f"no prompt of iteration {ppo.iteration + 1} has clips that can be read; quarantine.jsonl says why")
    return good, {address: clip for address, clip in clips.items() if clip is not None}


def look_back(ppo: PPO, experience: Experience, clips: Clips, measures: Measures) -> None:
    """Set `old`, `reference` and `values` of the samples that are trained on."""
    chosen = trainable(experience)
    if not chosen:
        # Every judgment failed, or every response is empty: nothing is trained, and nothing has to be known.
        experience.old = experience.reference = experience.values = measures.entropy = torch.zeros(experience.tokens)
        return

    def scored(model: Sequence[torch.nn.Module], with_entropy: bool = False) -> dict[str, torch.Tensor]:
        batches = ppo.batcher.batches(experience, chosen, clips, with_entropy)
        return score(model, batches, experience.tokens, ppo.runtime, ppo.group, ppo.heartbeat.beat)

    of_actor = scored(ppo.actor.model, with_entropy=True)
    experience.old, measures.entropy = of_actor["log_probs"], of_actor["entropy"]
    if ppo.reference is None:
        with adapters_off(*ppo.actor.model):
            experience.reference = scored(ppo.actor.model)["log_probs"]
    else:
        experience.reference = scored(ppo.reference)["log_probs"]
    experience.values = of_actor.get("values") if ppo.critic is None else scored(ppo.critic.model)["values"]


def learn(ppo: PPO, experience: Experience, clips: Clips) -> None:
    """The iteration's optimizer steps: all of the policy's, then all of the critic's, so that one of them at a time is awake.

    Neither reads what the other learns: the order changes nothing.
    """
    rl, shared = ppo.config.rl, ppo.critic is None and ppo.config.rl.ppo.baseline == "critic"
    truncation = rl.ppo.importance_truncation
    weights = None
    if truncation is not None:
        weights = importance_weights(experience.old, experience.rollout, experience.mask, truncation)
    actor, critic = actor_loss(experience, rl.ppo, ppo.kl.beta, weights), critic_loss(experience, rl.ppo)
    loss = shared_loss(actor, critic, rl.critic.coefficient) if shared else actor
    learners = [("train", ppo.actor, loss)] + ([] if ppo.critic is None else [("train critic", ppo.critic, critic)])
    for phase, learner, loss_of in learners:
        with ppo.colocation.phase(phase):
            for epoch in range(rl.epochs):
                for chosen in mini_batches(ppo, experience, epoch):
                    with_entropy = learner is ppo.actor and bool(rl.ppo.entropy_coefficient)
                    batches = ppo.batcher.batches(experience, chosen, clips, with_entropy)
                    ppo.heartbeat.beat("compute")
                    learner.step(batches, loss_of, ppo.heartbeat.beat)


def trainable(experience: Experience) -> list[int]:
    """Samples with a score and a token."""
    return [i for i in experience.valid.nonzero()[:, 0].tolist() if experience.samples[i].trained_tokens]


def mini_batches(ppo: PPO, experience: Experience, epoch: int) -> list[list[int]]:
    """The samples of every optimizer step of an epoch, a function of seed, iteration and epoch alone."""
    trained = trainable(experience)
    order = shuffled(len(trained), derive(ppo.config.run.seed, "mini-batches", ppo.iteration, epoch))
    shuffled_samples, count = [trained[i] for i in order], ppo.config.rl.mini_batches
    # Where there are fewer samples than steps, the rest of the steps are not taken.
    return [part for part in (shuffled_samples[i::count] for i in range(count)) if part]
