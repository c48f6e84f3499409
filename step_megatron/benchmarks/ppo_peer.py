"""The peers of the PPO benchmark: TRL's PPO (1.12.0) and RLOO (1.16.0), an iteration at a time (`ppo_job`).

It runs in an environment of its own (`peer_environment`), where nothing of step_megatron but `ppo_job` can be imported. TRL's PPO
takes a reward model only, so the programmatic reward is wrapped as one, with a backbone that passes ids through.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from step_megatron.benchmarks.ppo_job import Job, Pace

# Steps until its input ends.
_FOREVER = 1_000_000


class Pacing(TrainerCallback):
    """Lets an iteration begin when it is asked for; it is over after `steps` calls of `on_step_end`."""

    def __init__(self, pace: Pace, steps: int):
        self.pace, self.steps, self._step = pace, steps, 0

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.step = self.pace.timed("optimizer", optimizer.step)
        self.pace.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self._step += 1
        if self._step % self.steps == 0:
            self.pace.report()
            self.pace.wait()


class RewardModel(torch.nn.Module):
    """The programmatic reward where a model is asked for: at each token the mean score of the reply's tokens up to it."""

    base_model_prefix = "backbone"

    def __init__(self, job: Job, pace: Pace):
        super().__init__()
        self._scores, self._new, self._pace = torch.tensor(job.token_scores), job.new_tokens, pace

    def backbone(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        """Replies are the last columns, whatever the prompts' lengths."""
        replies = self._scores[input_ids[:, -self._new :]]
        means = replies.cumsum(1) / torch.arange(1, self._new + 1)
        self._pace.rewards += means[:, -1].tolist()
        means = torch.nn.functional.pad(means, (input_ids.shape[1] - self._new, 0))
        return SimpleNamespace(hidden_states=[means.unsqueeze(-1)])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def make_ppo(job: Job, pace: Pace):
    """TRL's PPO: a critic of its own, one optimizer step a mini-batch."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    config = PPOConfig(
        **_common(job),
        # Its mini-batches are cut from this; with smaller ones and accumulation it would step once an epoch.
        per_device_train_batch_size=job.replies,
        num_mini_batches=job.mini_batches,
        num_ppo_epochs=job.epochs,
        total_episodes=job.replies * _FOREVER,
        response_length=job.new_tokens,
        stop_token="eos",
        kl_coef=job.kl,
        lam=job.gae_lambda,
        num_sample_generations=0,
    )
    value = AutoModelForSequenceClassification.from_pretrained(f"{job.folder}/policy", num_labels=1, dtype=torch.float32)
    trainer = PPOTrainer(
        args=config,
        processing_class=_tokenizer(job),
        model=_policy(job),
        ref_model=_policy(job),
        reward_model=RewardModel(job, pace),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": job.prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": job.prompts}),
        callbacks=[Pacing(pace, 1)],
    )
    ppo_trainer.batch_generation = pace.timed("generate", ppo_trainer.batch_generation)
    ppo_trainer.get_reward = pace.timed("values and reward", ppo_trainer.get_reward)
    ppo_trainer.forward = pace.timed(_forward_phase, ppo_trainer.forward)
    trainer.accelerator.backward = pace.timed("train backward", trainer.accelerator.backward)
    return trainer


def make_rloo(job: Job, pace: Pace):
    """TRL's RLOO: no critic, `samples` replies a prompt, one optimizer step a mini-batch."""
    from trl import RLOOConfig, RLOOTrainer

    config = RLOOConfig(
        **_common(job),
        per_device_train_batch_size=job.replies // job.mini_batches,
        steps_per_generation=job.mini_batches,
        num_generations=job.samples,
        num_iterations=job.epochs,
        max_completion_length=job.new_tokens,
        max_steps=_FOREVER,
        beta=job.kl,
    )

    def reward(completion_ids: list[list[int]], **_) -> list[float]:
        means = [sum(job.token_scores[token] for token in ids) / len(ids) for ids in completion_ids]
        pace.rewards += means
        return means

    trainer = RLOOTrainer(
        model=_policy(job),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, tokens)) for tokens in job.prompts]}),
        processing_class=_tokenizer(job),
        callbacks=[Pacing(pace, job.epochs * job.mini_batches)],
    )

    def phase(model, *_) -> str:
        if torch.is_grad_enabled():
            return "train forward"
        return "reference" if model is trainer.ref_model else "old policy"

    trainer._generate = pace.timed("generate", trainer._generate)
    trainer._calculate_rewards = pace.timed("reward", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = pace.timed(phase, trainer._get_per_token_logps_and_entropies)
    trainer.accelerator.backward = pace.timed("train backward", trainer.accelerator.backward)
    return trainer


def _common(job: Job) -> dict[str, Any]:
    return {
        "output_dir": f"{job.folder}/{job.algorithm}",
        "use_cpu": True,
        "bf16": False,
        # Off, or it would compute every training forward twice.
        "gradient_checkpointing": False,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }


def _policy(job: Job) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(f"{job.folder}/policy", dtype=torch.float32)


def _tokenizer(job: Job) -> PreTrainedTokenizerFast:
    """Words are ids, so that a prompt's text has just its tokens."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(len(job.token_scores))}, unk_token=str(job.end)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=str(job.pad), eos_token=str(job.end), padding_side="left")


def _forward_phase(*_) -> str:
    return "train forward" if torch.is_grad_enabled() else "reference"


def main() -> None:
    """Run TRL's trainer on the job that the first argument names: an iteration for each line of standard input (`ppo_job`)."""
    job, pace = Job.read(sys.argv[1]), Pace()
    torch.set_num_threads(job.threads)
    set_seed(1)
    {"ppo": make_ppo, "rloo": make_rloo}[job.algorithm](job, pace).train()


if __name__ == "__main__":
    main()
