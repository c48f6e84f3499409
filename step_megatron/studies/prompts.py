"""The two kinds of prompt that the studies train and measure on, from the quickstart's prompts about real clips.

preference  the question as it is; a good reply names the right answer in a sentence. Judged as a whole.
rubric      the same question after "Answer in one word."; the criteria are the right answer, and that it is bare.

A kind is thus to be known from what the policy reads, and what is good for one kind is not for the other. `meta.checks` says what
a right reply is to a program (`data.checks`).
"""

import dataclasses
import random
from pathlib import Path

from step_megatron.data.checks import Check
from step_megatron.data.dialogues.phrases import ONE_WORD
from step_megatron.data.preferences import moved
from step_megatron.data.recipes.preferences import CRITERIA
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts, write_rl_prompts
from step_megatron.data.schema import SchemaError, Text

KINDS = ("preference", "rubric")
# As the quickstart's reward model knows them.
RIGHT, BARE = CRITERIA["right"], CRITERIA["bare"]


def write_kinds(source: Path, folder: Path, held_out: int) -> None:
    """Write `KIND.jsonl` and `KIND_held_out.jsonl` of both kinds into a folder.

    Args:
        source: folder of `train.jsonl` and `test.jsonl`, prompts with an answer and its choices. Of those for training
            every other one is of a kind, so that no question is trained as both; every held-out one is of both.
        held_out: the most held-out prompts of a kind.

    Raises:
        SchemaError: a file is missing, or a prompt has no choices.
    """
    train, test = (_answerable(source / f"{split}.jsonl", folder) for split in ("train", "test"))
    for number, (kind, make) in enumerate({"preference": _preferred, "rubric": _wished}.items()):
        write_rl_prompts(training_file(folder, kind), map(make, train[number::2]))
        write_rl_prompts(held_out_file(folder, kind), map(make, test[:held_out]))


def training_file(folder: Path, kind: str) -> Path:
    """Where `write_kinds` puts a kind's prompts for training."""
    return folder / f"{kind}.jsonl"


def held_out_file(folder: Path, kind: str) -> Path:
    """Where `write_kinds` puts a kind's held-out prompts."""
    return folder / f"{kind}_held_out.jsonl"


def _answerable(path: Path, folder: Path) -> list[RLPrompt]:
    """The prompts of a file, their clips as a file in `folder` names them."""
    prompts = read_rl_prompts(path)
    # Files have their tasks in turn: every other prompt could be of one task.
    random.Random(0).shuffle(prompts)
    for prompt in prompts:
        if prompt.answer is None or len(prompt.choices) < 2:
            raise SchemaError(f"{path}: prompt {prompt.id!r} has no answer with choices: add them")
    return [dataclasses.replace(p, history=moved(p.history, path.parent, folder), reference=p.answer, rubric=()) for p in prompts]


def _preferred(prompt: RLPrompt) -> RLPrompt:
    return _checked(prompt, "sentence")


def _wished(prompt: RLPrompt) -> RLPrompt:
    *earlier, question = prompt.history
    # Before the question, as in the dialogues of SFT.
    content = (Text(f"{ONE_WORD.text} {item.text}") if isinstance(item, Text) else item for item in question.content)
    history = (*earlier, dataclasses.replace(question, content=tuple(content)))
    return _checked(dataclasses.replace(prompt, history=history, rubric=(RIGHT, BARE)), ONE_WORD.form)


def _checked(prompt: RLPrompt, form: str) -> RLPrompt:
    others = tuple(choice for choice in prompt.choices if choice != prompt.answer)
    check = Check((prompt.answer,), others, form)
    return dataclasses.replace(prompt, meta={**prompt.meta, "checks": [check.record()]})
