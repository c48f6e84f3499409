"""Preference records -> what a reward model is trained on: the judge's prompt, then reasoning and verdict, as conversations.

The stage that trains on them is the same supervised one as any other; what is special is here, and in the turn's `train`: with
reasoning the loss covers reasoning and verdict, without it the verdict alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from step_megatron.config.rl import JudgeConfig
from step_megatron.data.preferences import Preference, moved, read_preferences
from step_megatron.data.recipes.preferences import build_preferences
from step_megatron.data.recipes.prompts import build_prompts
from step_megatron.data.schema import Conversation, SchemaError, Text, Turn, read_conversations, write_conversations
from step_megatron.rl.judge.prompt import Pair, build_prompt
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import write_verdict


def pair_of(preference: Preference) -> Pair:
    """What a judge is asked about a record."""
    return Pair(preference.id, preference.history, preference.response, preference.reference, preference.rubric)


def judge_conversation(preference: Preference, swapped: bool, judge: JudgeConfig) -> Conversation:
    """The judge's prompt with the answer that it should give.

    Args:
        swapped: the reference is shown first; the verdict turns with it.

    Raises:
        SchemaError: the record has no verdict, or one that the scale of `judge.levels` has not.
    """
    scale = Scale(judge.levels)
    if preference.verdict is None:
        raise SchemaError(f"preference {preference.id!r} has no verdict; label it, or leave it out of the training data")
    verdict = preference.verdict
    if outside := {*verdict.rubric, verdict.overall} - {*scale.values}:
        raise SchemaError(
            f"preference {preference.id!r}: level {min(outside)} is not on the scale of rl.judge.levels={judge.levels}"
        )
    prompt = build_prompt(pair_of(preference), swapped, scale, judge.instructions, judge.max_characters)
    answer = write_verdict(verdict.swapped() if swapped else verdict)
    reasoning = None
    if preference.reasoning is not None:
        reasoning = _as_shown(preference.reasoning, swapped)
    turn = Turn("assistant", (Text(answer),), reasoning, train=True if reasoning is not None else "content")
    return Conversation(prompt.id, preference.source, (*prompt.turns, turn), preference.meta)


def _as_shown(reasoning: str, swapped: bool) -> str:
    """The reasoning about numbered replies; lines that are about one of them come in the order in which they are shown."""
    shown = ("{reference}", "{response}") if swapped else ("{response}", "{reference}")
    first, second = (f"{name}:" for name in shown)
    lines = reasoning.split("\n")
    about = [i for i, line in enumerate(lines) if line.startswith((first, second))]
    in_order = sorted((lines[i] for i in about), key=lambda line: line.startswith(second))
    for place, line in zip(about, in_order, strict=True):
        lines[place] = line
    return "\n".join(lines).replace(shown[0], "Reply 1").replace(shown[1], "Reply 2")


def judge_conversations(preferences: Iterable[Preference], judge: JudgeConfig) -> Iterator[Conversation]:
    """Each record in both orders: a judge that has seen one place win more often learns the place."""
    for preference in preferences:
        for swapped in (False, True):
            yield judge_conversation(preference, swapped, judge)


def open_speech_rl_data(data_set: Path, seed: int) -> list[Conversation]:
    """Make what reinforcement learning on the open-speech data set needs, in its folder:

        preferences/{train,validation,test}.jsonl           constructed preferences (`recipes.preferences`)
        preferences/judge_{train,validation}.jsonl          the judge's side of them, with the brief instructions
        prompts/{train,test}.jsonl                          prompts of PPO (`recipes.prompts`)

    Returns:
        The conversations that a reward model is trained on.
    """
    build_preferences(data_set, seed)
    for split in ("train", "validation"):
        folder = data_set / "preferences"
        convert_preferences(folder / f"{split}.jsonl", folder / f"judge_{split}.jsonl", JudgeConfig(instructions="brief"))
    build_prompts(data_set, seed)
    return read_conversations(data_set / "preferences/judge_train.jsonl")


def convert_preferences(path: Path, out: Path, judge: JudgeConfig) -> tuple[int, int]:
    """Write the training conversations of a file of records; addresses still name the same clips from `out`'s folder.

    Returns:
        How many conversations were written, and how many records without a verdict were passed over.

    Raises:
        SchemaError: a record is not valid, or none has a verdict.
    """
    records = read_preferences(path)
    judged = [record for record in records if record.verdict is not None]
    if not judged:
        raise SchemaError(f"{path}: no record has a verdict; label some first")
    out.parent.mkdir(parents=True, exist_ok=True)
    places = path.parent.resolve(), out.parent.resolve()
    conversations = (Conversation(c.id, c.source, moved(c.turns, *places), c.meta) for c in judge_conversations(judged, judge))
    return write_conversations(out, conversations), len(records) - len(judged)
