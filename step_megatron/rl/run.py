"""A run of PPO, from a configuration to a trained policy: `run_ppo(config)` under torchrun or in one process.

A run directory holds, beside what every run does (`training.stage`):

    metrics.jsonl          a line for every iteration (`measuring`)
    checkpoints/           the policy's; `critic/checkpoints/` the critic's, of the same iterations
    rollouts/000012.jsonl  the samples of an iteration as people read them, with their scores
    iterations/            what the iterations since the last checkpoint have generated and judged (`journal`)
    trace/rank_0.json      phases of every iteration, for chrome://tracing or Perfetto

Calling it again goes on from the newest checkpoint. Iterations after it are done again from what their journals hold: the same
samples and judgments, the same updates. To the bit, if a kill came while samples were being generated, with
`generation.batch_invariant`; without it log-probabilities of the rollout may differ in their last bits.
"""

import dataclasses
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from step_megatron.audio.index import AudioIndex
from step_megatron.checkpoint.directory import (
    CheckpointError,
    Retention,
    checkpoint_at,
    checkpoint_root,
    latest_checkpoint,
    step_of,
)
from step_megatron.checkpoint.distributed import load_checkpoint, unwrap
from step_megatron.checkpoint.recovery import newest_good
from step_megatron.checkpoint.saving import Checkpoints
from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.data.clip_lengths import ClipLengths
from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.generation.backend import rollout_engine
from step_megatron.generation.rendering import Rendering
from step_megatron.rl.batching import ResponseBatcher
from step_megatron.rl.colocation import Colocation
from step_megatron.rl.judge.judging import Judge
from step_megatron.rl.judge.phase import Judging, OutsideJudging
from step_megatron.rl.judge.server import ServerJudge
from step_megatron.rl.kl import KLController
from step_megatron.rl.learning import Learner
from step_megatron.rl.loop import PPO, iterate
from step_megatron.rl.models import NEEDS, build_actor, build_critic, build_judge, build_reference, residents_of
from step_megatron.rl.prompt_sampler import PromptSampler
from step_megatron.rl.rewarding import needs_judge
from step_megatron.rl.rewards import Rewards
from step_megatron.rl.sampling import conversation_of, too_long
from step_megatron.runtime.device import Runtime, initialize, shutdown, store_client
from step_megatron.runtime.metrics import MetricsWriter
from step_megatron.runtime.progress import Progress, get_logger
from step_megatron.training.encoding import encoded_audio
from step_megatron.training.interruption import Interruption
from step_megatron.training.optimizer import settled_parameters
from step_megatron.training.record import changed_settings, check_record, write_record
from step_megatron.training.stage import load_tokenizer
from step_megatron.training.watchdog import Heartbeat, Watchdog

logger = get_logger(__name__)
CRITIC = "critic"


def run_ppo(config: Config, judge: Judge | None = None) -> dict[str, Any]:
    """Train, or go on with, the run of `config.run.dir`; every rank calls this.

    Args:
        judge: who judges, in the place of `rl.judge.run` or `rl.judge.server`; for programs that compare replies.

    Returns:
        `run_dir`, `checkpoint`, `iterations`, `seconds` of this call, `interrupted` (a signal's name, or None), and the last line
        of metrics; the same on every rank.

    Raises:
        ConfigError, ValueError: settings or data that cannot be used; the message names the key or the file.
        JudgingError: too many judgments failed.
    """
    started = time.perf_counter()
    config = _with_steps(config)
    runtime = initialize(config)
    try:
        group = dist.group.WORLD if runtime.backend == "gloo" else dist.new_group(backend="gloo", timeout=runtime.timeout)
        with Interruption(group) as interruption, opened_run(config, runtime, group, judge) as run:
            last = run.train(interruption)
        return {
            "run_dir": config.run.dir,
            "checkpoint": str(latest_checkpoint(config.run.dir)),
            "iterations": run.ppo.iteration,
            "seconds": round(time.perf_counter() - started, 3),
            "interrupted": interruption.signal_name,
            **last,
        }
    finally:
        shutdown()


@dataclasses.dataclass
class Run:
    """A PPO run with what surrounds its iterations: metrics, checkpoints, stopping."""

    ppo: PPO
    metrics: MetricsWriter
    actor_checkpoints: Checkpoints
    critic_checkpoints: Checkpoints | None

    def train(self, interruption: Interruption) -> dict[str, float]:
        """Iterate to the end, or until a signal asks to stop; the last line of metrics."""
        ppo, config = self.ppo, self.ppo.config
        total, interval = config.rl.iterations, config.training.save_interval
        last: dict[str, float] = {}
        if ppo.iteration >= total:
            logger.info("%s has all of its %d iterations; raise rl.iterations to go on", config.run.dir, total)
            return last
        if ppo.runtime.rank == 0:
            write_record(config, ppo.runtime)
        with self._watchdog(), Progress(total, "ppo", "iterations", done=ppo.iteration) as bar:
            stopping = False
            while ppo.iteration < total and not stopping:
                last = iterate(ppo)
                self.metrics.write(ppo.iteration, last)
                bar.update(1, f"score {last['score']:.3f}  kl {last['kl']:.3g}")
                stopping = interruption.agreed()
                if stopping or ppo.iteration == total or (interval and ppo.iteration % interval == 0):
                    self.save()
            self._wait()
        return last

    def save(self) -> None:
        """A checkpoint of critic and policy, in this order: the policy's says that the iteration is saved."""
        ppo = self.ppo
        self.metrics.flush()
        ppo.heartbeat.beat("save")
        with ppo.colocation.phase("save"):
            pairs = [(self.critic_checkpoints, ppo.critic, {}), (self.actor_checkpoints, ppo.actor, state_of(ppo))]
            for checkpoints, learner, extra in pairs:
                if learner is None:
                    continue
                state = learner.state
                with settled_parameters(state.model):
                    checkpoints.save(ppo.iteration, state.model, state.optimizer, state.scheduler, extra)
                if learner is ppo.critic:
                    checkpoints.wait()
        self._forget()

    def _wait(self) -> None:
        self.ppo.heartbeat.beat("save")
        self.actor_checkpoints.wait()
        self._forget()

    def _forget(self) -> None:
        """Delete the journals of iterations that a complete checkpoint holds."""
        folder = Path(self.ppo.config.run.dir)
        if self.ppo.runtime.rank or (checkpoint := latest_checkpoint(folder)) is None:
            return
        for path in (folder / "iterations").glob("[0-9]*"):
            if int(path.name) <= step_of(checkpoint):
                shutil.rmtree(path, ignore_errors=True)

    def _watchdog(self) -> Watchdog:
        ppo = self.ppo
        timeout = ppo.config.training.hang_timeout_seconds
        place = (ppo.runtime.rank, ppo.runtime.world_size, ppo.config.run.dir, timeout)
        return Watchdog(ppo.heartbeat, store_client("watchdog"), *place)


def _forget_later(config: Config, done: int) -> None:
    """Delete the journals of iterations after the next one: with other settings their weights will be others too."""
    for path in (Path(config.run.dir) / "iterations").glob("[0-9]*"):
        if int(path.name) > done + 1:
            shutil.rmtree(path)
            logger.warning("settings changed: iteration %d is generated and judged again", int(path.name))


def state_of(ppo: PPO) -> dict[str, Any]:
    """What a run needs to go on beside models and optimizers, as JSON values."""
    return {
        "prompts": ppo.prompts.state_dict(),
        "kl": ppo.kl.state_dict(),
        "rewards": ppo.rewards.state_dict(),
        "skipped": {name: learner.skipped for name, learner in _learners(ppo).items()},
        "failed_clips": dict(ppo.audio.failures) if ppo.audio else {},
    }


def _load(ppo: PPO, checkpoint: Path) -> None:
    """Go on from the policy's checkpoint, and the critic's of the same iteration."""
    state = ppo.actor.state
    ppo.iteration, extra = load_checkpoint(checkpoint, state.model, state.optimizer, state.scheduler, verified=True)
    if ppo.critic is not None:
        theirs = checkpoint_at(checkpoint_root(Path(ppo.config.run.dir) / CRITIC), ppo.iteration)
        if not theirs.is_dir():
            raise CheckpointError(
                f"{theirs} is missing: the policy's checkpoint cannot go on without the critic's; copy it here again"
            )
        state = ppo.critic.state
        load_checkpoint(theirs, state.model, state.optimizer, state.scheduler)
    ppo.prompts.load_state_dict(extra["prompts"])
    ppo.kl.load_state_dict(extra["kl"])
    ppo.rewards.load_state_dict(extra["rewards"])
    for name, learner in _learners(ppo).items():
        learner.skipped = extra["skipped"].get(name, 0)
    if ppo.audio is not None:
        ppo.audio.recall(extra["failed_clips"])
    logger.info("going on from %s", checkpoint)


def _learners(ppo: PPO) -> dict[str, Learner]:
    return {"actor": ppo.actor} | ({} if ppo.critic is None else {CRITIC: ppo.critic})


@contextmanager
def opened_run(config: Config, runtime: Runtime, group: dist.ProcessGroup, judge: Judge | None = None) -> Iterator[Run]:
    """Everything of a run, at the iteration of its newest checkpoint or at 0; collective over all ranks."""
    with ExitStack() as ending:
        yield _build(config, runtime, group, judge, ending)


def _build(config: Config, runtime: Runtime, group: dist.ProcessGroup, judge: Judge | None, ending: ExitStack) -> Run:
    heartbeat, rewards, kl = Heartbeat(), Rewards(config.rl.rewards), KLController(config.rl.ppo.kl)
    rendering = Rendering(load_tokenizer(config), config.tokenizer)
    index = AudioIndex.load(config.data.index) if config.data.index else None
    lengths = ClipLengths(index, config.adaptor)
    batcher = ResponseBatcher(config, rendering.tokenizer.pad_id, lengths, runtime)
    prompts = PromptSampler(config, lambda prompt: _unusable(prompt, config, rendering, lengths, batcher.budget))
    checkpoint = newest_good(config.run.dir, refuse_damaged=config.training.damaged_checkpoint == "refuse")
    # Before anything takes long: it is an error where nothing can be written.
    actor_checkpoints = ending.enter_context(closing(_checkpoints(config, runtime)))
    resumes = checkpoint is not None
    if resumes:
        check_record(config, runtime)
    if runtime.rank == 0 and changed_settings(config):
        _forget_later(config, step_of(checkpoint) if resumes else 0)
    audio = None if index is None else encoded_audio(config, runtime, index, passes=2)
    actor = build_actor(config, runtime, group, resumes)
    critic = build_critic(config, runtime, group, resumes)
    critic_checkpoints = None if critic is None else ending.enter_context(closing(_checkpoints(config, runtime, CRITIC)))
    reference = build_reference(config)
    engine = rollout_engine(unwrap(actor.model[0]), config)
    settings = config.rl.colocation
    offloads = settings.offload == "on" or (settings.offload == "auto" and runtime.device.type == "cuda")
    judging, judge_model = _judging(config, runtime, group, index, rewards, judge, heartbeat, offloads, ending)
    if judging is not None:
        ending.callback(judging.close)
    residents = residents_of(
        actor, critic, reference, engine, None if judge_model is None else (judging, judge_model), audio and audio.encoder
    )
    trace = Path(config.run.dir) / "trace" / f"rank_{runtime.rank}.json"
    colocation = Colocation(residents, NEEDS, offloads, runtime.device, trace, runtime.rank)
    ppo = PPO(
        config, runtime, group, prompts, rendering, lengths, audio, engine, batcher, actor, critic, reference, judging, rewards,
        kl, colocation, heartbeat,
    )  # fmt: skip
    if resumes:
        _load(ppo, checkpoint)
        # Samples carry the number of the iteration whose weights made them.
        engine.weight_version = ppo.iteration
    metrics = ending.enter_context(MetricsWriter(config.run.dir, config, ppo.iteration))
    return Run(ppo, metrics, actor_checkpoints, critic_checkpoints)


def _judging(
    config: Config,
    runtime: Runtime,
    group: dist.ProcessGroup,
    index: AudioIndex | None,
    rewards: Rewards,
    judge: Judge | None,
    heartbeat: Heartbeat,
    offloads: bool,
    ending: ExitStack,
) -> tuple[Judging | None, Any]:
    """Who judges, and the module where that is a model of ours."""
    settings = config.rl.judge
    if not needs_judge(rewards):
        return None, None
    if judge is None and settings.run:
        overlap = config.rl.colocation.overlap_judge and not offloads
        return build_judge(config, runtime, group, index, overlap, heartbeat.beat)
    if judge is None:
        if not settings.server.url:
            raise ConfigError(
                "rl.rewards wants judgments, and nobody is there to judge: name a reward model's run in rl.judge.run, or a "
                "server in rl.judge.server; or leave the kinds preference and rubric out"
            )
        if not settings.server.cache_dir:
            # What a killed run was told is not asked again.
            server = dataclasses.replace(settings.server, cache_dir=str(Path(config.run.dir) / "answers"))
            settings = dataclasses.replace(settings, server=server)
        judge = ending.enter_context(closing(ServerJudge(settings)))
    return OutsideJudging(judge, settings, config.run.seed, group, config.rl.colocation.overlap_judge), None


def _unusable(prompt: RLPrompt, config: Config, rendering: Rendering, lengths: ClipLengths, budget: int) -> str:
    """Why a prompt cannot be used, "" where it can."""
    clips = prompt.conversation.audio_addresses()
    if clips and lengths.index is None:
        return "it has audio, but there is no audio index; run `step-megatron data validate` and set data.index"
    if missing := [clip for clip in clips if not lengths.has_tokens(clip)]:
        return f"{missing[0]} is not in the audio index"
    settings = config.rl.rollout
    sample = rendering.sample(conversation_of(prompt, settings.shows_rubric), lengths.tokens)
    return too_long(sample, min(budget, config.model.max_positions), settings.max_new_tokens)


def _with_steps(config: Config) -> Config:
    """The configuration with the number of optimizer steps that the iterations make, for the learning rate's schedule."""
    rl = config.rl
    for name in ("iterations", "epochs", "mini_batches"):
        if getattr(rl, name) < 1:
            raise ConfigError(f"rl.{name}={getattr(rl, name)}: must be at least 1")
    if rl.rollout.prompts < 1 or rl.rollout.samples < 1:
        raise ConfigError("rl.rollout: prompts and samples must be at least 1")
    if rl.ppo.baseline != "critic" and rl.rollout.samples < 2:
        raise ConfigError(
            f"rl.ppo.baseline={rl.ppo.baseline}: compares the samples of a prompt; set rl.rollout.samples to 2 or more"
        )
    steps = rl.iterations * rl.epochs * rl.mini_batches
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))


def _checkpoints(config: Config, runtime: Runtime, part: str = "") -> Checkpoints:
    """Of the policy, or of `part`, which keeps one more: the policy's of the same iteration is complete after it."""
    training = config.training
    keep = training.keep_checkpoints + (1 if part and training.keep_checkpoints else 0)
    retention = Retention(keep, training.keep_checkpoint_every)
    return Checkpoints(Path(config.run.dir) / part, retention, training.async_save, runtime.timeout)
