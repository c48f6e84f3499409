"""What a policy replies to held-out prompts, and what a program says of it that it was not trained against (`rl.win_rate`).

Replies are sampled at temperature 1: they are the policy, not its most likely words. Measures of the replies of one kind:

    right, form      shares that name the right answer and no other, and that have the form that was asked for
    reward           mean of both
    preference       win rate against the start's replies to the same prompts
    words, reasoning_words   mean length of reply and reasoning
    distinct_1, distinct_2   different words, and pairs of words, by their number in all that was written
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts
from step_megatron.evaluation.load import loaded_run
from step_megatron.evaluation.scoring import split_reply
from step_megatron.rl.rewards import final_reply
from step_megatron.rl.win_rate import win_rate
from step_megatron.studies.prompts import held_out_file

# What the policy wrote after the prompts, from inside its thinking on, by kind: all prompts, and all again for another sample.
Texts = Mapping[str, Sequence[str]]


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
    compared = win_rate(list(prompts) * (len(texts) // len(prompts)), texts, start)
    ours = compared["after"]
    reasoning = [split_reply(text).reasoning.split() for text in texts]
    written = [[*before, *final_reply(text).split()] for before, text in zip(reasoning, texts, strict=True)]
    return {
        "reward": (ours["right"] + ours["form"]) / 2,
        "preference": compared["win_rate"],
        **ours,
        "reasoning_words": sum(map(len, reasoning)) / len(texts),
        "distinct_1": _distinct([(word,) for words in written for word in words]),
        "distinct_2": _distinct([pair for words in written for pair in pairwise(words)]),
    }


def _distinct(grams: Sequence[tuple[str, ...]]) -> float:
    return len(set(grams)) / max(1, len(grams))
