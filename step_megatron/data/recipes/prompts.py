"""Prompts of PPO over the clips of the open-speech data set: one question about one clip, and what a reply is held against.

The reference is the bare right answer. A half is judged as plain preference, the others by a rubric: the right answer alone or in
a sentence. The answer is there too, as one of the task's (`multiple_choice`), for a verifiable reward. `meta.checks` is what a
right sentence is to a program (`data.checks`), so that a policy need not be measured by the judge that it was trained against.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from step_megatron.data.checks import Check
from step_megatron.data.preferences import moved
from step_megatron.data.recipes.preferences import CRITERIA, SOURCE, questions_by_task
from step_megatron.data.rl_prompts import RLPrompt, write_rl_prompts
from step_megatron.data.schema import Conversation, read_conversations

COUNTS = {"train": 2000, "test": 200}
_RUBRICS = ((), (), ("right",), ("right", "sentence"))


def build_prompts(data_set: Path, seed: int, counts: dict[str, int] | None = None) -> dict[str, int]:
    """Write `prompts/{train,test}.jsonl` in the data set's folder; returns the number of prompts by split.

    Args:
        counts: the most prompts by split (default: `COUNTS`).

    Raises:
        SchemaError: a file of the data set is missing or broken.
    """
    folder = data_set / "prompts"
    folder.mkdir(exist_ok=True)
    written = {}
    for split, count in (counts or COUNTS).items():
        conversations = read_conversations(data_set / f"{split}.jsonl")
        made = prompts(conversations, count, random.Random(f"{seed}:prompts:{split}"))
        placed = (dataclasses.replace(prompt, history=moved(prompt.history, data_set, folder)) for prompt in made)
        written[split] = write_rl_prompts(folder / f"{split}.jsonl", placed)
    return written


def prompts(conversations: list[Conversation], count: int, rng: random.Random) -> Iterator[RLPrompt]:
    """Up to `count` prompts, the first questions of the conversations of one split, tasks in turn."""
    by_task = {task: [c for c, place in asked if place == 1] for task, asked in questions_by_task(conversations, rng).items()}
    answers = {task: sorted({c.turns[1].text for c in asked}) for task, asked in by_task.items()}
    in_turn = itertools.chain.from_iterable(
        itertools.zip_longest(*([(task, c) for c in asked] for task, asked in by_task.items()))
    )
    for task, conversation in itertools.islice(filter(None, in_turn), count):
        answer = conversation.turns[1].text
        others = tuple(other for other in answers[task] if other != answer)
        kept = {name: conversation.meta[name] for name in ("split", "text", "group") if name in conversation.meta}
        yield RLPrompt(
            id=conversation.id,
            source=SOURCE,
            history=conversation.turns[:1],
            reference=answer,
            rubric=tuple(CRITERIA[name] for name in rng.choice(_RUBRICS)),
            answer=answer,
            check="multiple_choice",
            choices=tuple(answers[task]),
            meta={**kept, "task": task, "checks": [Check((answer,), others, form="sentence").record()]},
        )
