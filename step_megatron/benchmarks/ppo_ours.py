"""Our side of the PPO benchmark: iterations of the loop that `train ppo` runs, one at a time (`ppo_job`)."""

import sys
from pathlib import Path

import torch.distributed as dist

from step_megatron.benchmarks.ppo_job import Job, Pace
from step_megatron.config import load_config
from step_megatron.config.schema import Config
from step_megatron.data.schema import Turn
from step_megatron.rl.judge.local import ScoringJudge
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.loop import iterate
from step_megatron.rl.run import opened_run
from step_megatron.runtime.device import initialize, shutdown

# What a reply is rewarded for: how often it has this letter, over the most tokens that it may have.
LETTER = "e"
PROMPTS = "prompts-{}.jsonl"
_FOREVER = 1_000_000


def settings(folder: Path, algorithm: str = "ppo", job: Job | None = None) -> Config:
    """The configuration; without a job it is that of model and tokenizer alone."""
    overrides = [
        f"run={{dir: {folder}/{algorithm}-ours, device: cpu, seed: 1}}",
        "model.preset=tiny",
        f"tokenizer={{path: {folder}/tokenizer, template: chatml}}",
        # No audio: nothing of it is trained, as at the peers.
        "model.freeze=['adaptor.*']",
    ]
    if job is not None:
        baseline = "leave_one_out" if algorithm == "rloo" else "critic"
        critic = "shared" if algorithm == "shared" else "separate"
        prompts = len(job.prompts)
        overrides += [
            f"run.threads={job.threads}",
            f"training={{steps: {_FOREVER}, lr_schedule: constant, lr_warmup_steps: 0}}",
            f"megatron.optimizer={{lr: {job.learning_rate}, min_lr: {job.learning_rate}, weight_decay: 0.0}}",
            "data.tokens_per_micro_batch=8192",
            f"rl={{iterations: {_FOREVER}, epochs: {job.epochs}, mini_batches: {job.mini_batches}}}",
            f"rl.prompts=[{{name: bench, path: {folder}/{PROMPTS.format(prompts)}}}]",
            f"rl.rollout={{prompts: {prompts}, samples: {job.samples}, max_new_tokens: {job.new_tokens}}}",
            f"rl.ppo={{baseline: {baseline}, gae_lambda: {job.gae_lambda}, kl: {{beta: {job.kl}}}}}",
            f"rl.critic={{kind: {critic}, lr_factor: 1.0}}",
            # A level for every letter: the reward is their number itself.
            "rl.rewards=[{kind: preference}]",
            f"rl.judge={{levels: {2 * job.new_tokens + 1}, orders: random}}",
            f"generation={{rows: {job.replies}, cache_tokens: 16384}}",
        ]
    return load_config(None, overrides)


def letters(history: tuple[Turn, ...], reply: str) -> float:
    """How often the reply has the letter."""
    return float(reply.count(LETTER))


def main() -> None:
    """Run the job that the first argument names: an iteration for each line of standard input (`ppo_job`)."""
    job, pace = Job.read(sys.argv[1]), Pace()
    config = settings(Path(job.folder), job.algorithm, job)
    runtime = initialize(config)
    try:
        judge = ScoringJudge(letters, Scale(config.rl.judge.levels), span=job.new_tokens)
        with opened_run(config, runtime, dist.group.WORLD, judge) as run:
            while True:
                pace.wait()
                metrics = iterate(run.ppo)
                pace.rewards.append(metrics["score"])
                pace.report({name.removeprefix("seconds/"): metrics[name] for name in metrics if name.startswith("seconds/")})
    finally:
        shutdown()


if __name__ == "__main__":
    main()
