"""PPO on tones and sums: what `training.toy_run` makes, as prompts, and runs of a few seconds."""

from pathlib import Path

from training.toy_run import PITCHES, overrides

from step_megatron.config import load_config

# Samples have the same bits whatever they are generated beside.
EXACT = ("generation.batch_invariant=true", "generation.invariant_rows=8")


def write_prompts(data: Path) -> None:
    """`prompts.jsonl`: the tones of `training.toy_run.write_data`, with an answer and a reference; half with a rubric."""
    from step_megatron.data.rl_prompts import RLPrompt, write_rl_prompts
    from step_megatron.data.schema import read_conversations

    prompts = []
    for number, conversation in enumerate(read_conversations(data / "train.jsonl")):
        label = list(PITCHES)[number % 3]
        rubric = ("Names the pitch.",) if number % 2 else ()
        history = conversation.turns[:1]
        prompts.append(RLPrompt(conversation.id, "tones", history, label, rubric=rubric, answer=label))
    write_rl_prompts(data / "prompts.jsonl", prompts)


def ppo_overrides(data: str, run_dir: str) -> list[str]:
    """Three iterations of four prompts with two samples each, rewarded by the number of a letter in the reply."""
    return overrides(data, run_dir) + [
        f"rl.prompts=[{{name: tones, path: {data}/prompts.jsonl}}]",
        "rl={iterations: 3, epochs: 2, mini_batches: 2}",
        "rl.rollout={prompts: 4, samples: 2, max_new_tokens: 6}",
        "rl.rewards=[{kind: preference}, {kind: rubric}, {kind: verifiable}]",
        "rl.ppo.kl.beta=0.01",
        "generation={rows: 16, cache_tokens: 1024}",
        "training={lr_warmup_steps: 0, lr_schedule: constant, save_interval: 1}",
        "megatron.optimizer.lr=1e-3",
        "megatron.optimizer.weight_decay=0.0",
    ]


def letters(history, reply: str) -> float:
    """A reply is the better the more vowels it has."""
    return min(1.0, sum(letter in "aeiou" for letter in reply) / 3)


def scoring_judge(config):
    from step_megatron.rl.judge.local import ScoringJudge
    from step_megatron.rl.judge.scale import Scale

    return ScoringJudge(letters, Scale(config.rl.judge.levels))


def run(rank: int, world_size: int, *, data: str, run_dir: str, extra: tuple[str, ...] = (), judge=scoring_judge) -> dict:
    """Run PPO."""
    from step_megatron.rl.run import run_ppo

    config = load_config(None, ppo_overrides(data, run_dir) + list(extra))
    return run_ppo(config, judge and judge(config))
