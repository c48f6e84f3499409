"""What a policy replies to held-out prompts, and what a program says of it (`data.checks`) that it was not trained against.

Replies are sampled at temperature 1: they are the policy, not its most likely words. Measures of the replies of one kind:

    right, form      shares that name the right answer and no other, and that have the form that was asked for
    reward           mean of both
    preference       how often a reply beats the start's to the same prompt: three for right, one for form; a tie is half a win
    words, reasoning_words   mean length of reply and reasoning
    distinct_1, distinct_2   different words, and pairs of words, by their number in all that was written
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from step_megatron.config.schema import JudgeConfig
from step_megatron.data.checks import Check, read_check
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts
from step_megatron.evaluation.load import loaded_run
from step_megatron.evaluation.scoring import split_reply
from step_megatron.rl.judge.judging import judge_pairs
from step_megatron.rl.judge.local import ScoringJudge
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.rewards import final_reply
from step_megatron.studies.prompts import held_out_file

# What the policy wrote after the prompts, from inside its thinking on, by kind: all prompts, and all again for another sample.
Texts = Mapping[str, Sequence[str]]
_RIGHT, _FORM = 3.0, 1.0


def sample_held_out(
    run: Path, folder: Path, kinds: Iterable[str], samples: int, max_new_tokens: int, seed: int
) -> dict[str, list[str]]:
    """Let a run's newest checkpoint reply to the held-out prompts of a folder that `prompts.write_kinds` wrote.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    texts = {}
    with loaded_run(run, folder) as trained:
        for kind in kinds:
            asked = [prompt.conversation for prompt in read_rl_prompts(held_out_file(folder, kind))] * samples
            trained.encode([address for each in asked for address in each.audio_addresses()])
            replies = trained.reply(asked, max_new_tokens, temperature=1.0, seed=seed)
            # A clip that cannot be read was refused when the start was trained: no reply is a wrong one here.
            texts[kind] = [text or "" for text in replies]
    return texts


def measure(folder: Path, texts: Texts, start: Texts) -> dict[str, float]:
    """The measures of the module as `KIND/MEASURE`; `start` is what the start wrote, the same number of samples."""
    prompts = {kind: read_rl_prompts(held_out_file(folder, kind)) for kind in texts}
    of_kinds = {kind: _measure(prompts[kind], texts[kind], start[kind]) for kind in texts}
    return {f"{kind}/{name}": value for kind, found in of_kinds.items() for name, value in found.items()}


def _measure(prompts: Sequence[RLPrompt], texts: Sequence[str], start: Sequence[str]) -> dict[str, float]:
    asked = list(prompts) * (len(texts) // len(prompts))
    checks = [read_check(prompt.meta["checks"][-1]) for prompt in asked]
    replies = [final_reply(text) for text in texts]
    right = _mean(check.content(reply) for check, reply in zip(checks, replies, strict=True))
    form = _mean(check.kept_form(reply) for check, reply in zip(checks, replies, strict=True))
    reasoning = [split_reply(text).reasoning.split() for text in texts]
    written = [[*before, *reply.split()] for before, reply in zip(reasoning, replies, strict=True)]
    return {
        "reward": (right + form) / 2,
        "right": right,
        "form": form,
        "preference": _win_rate(asked, checks, replies, [final_reply(text) for text in start]),
        "words": _mean(len(reply.split()) for reply in replies),
        "reasoning_words": _mean(map(len, reasoning)),
        "distinct_1": _distinct([(word,) for words in written for word in words]),
        "distinct_2": _distinct([pair for words in written for pair in pairwise(words)]),
    }


def _win_rate(prompts: Sequence[RLPrompt], checks: Sequence[Check], replies: Sequence[str], others: Sequence[str]) -> float:
    by_history = {prompt.history: check for prompt, check in zip(prompts, checks, strict=True)}

    def score(history, reply: str) -> float:
        check = by_history[history]
        return _RIGHT * check.content(reply) + _FORM * check.kept_form(reply)

    settings = JudgeConfig(orders="random")
    scale = Scale(settings.levels)
    pairs = [Pair(str(i), p.history, *both) for i, (p, *both) in enumerate(zip(prompts, replies, others, strict=True))]
    rewards = [judgment.reward for judgment in judge_pairs(pairs, ScoringJudge(score, scale, scale.best), settings, seed=0)]
    return _mean((reward > 0) + (reward == 0) / 2 for reward in rewards)


def _distinct(grams: Sequence[tuple[str, ...]]) -> float:
    return len(set(grams)) / max(1, len(grams))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))
