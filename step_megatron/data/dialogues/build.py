"""Build multi-turn dialogues about the open-speech clips: `build_dialogues(open_speech, out)`.

    {train,validation,test}.jsonl   dialogues; a split's clips are those of the same split of the open-speech data set
    tokenizer/                      the open-speech vocabulary, if it is a compact one, with the words of the dialogues behind it
    SUMMARY.json                    counts by split and aspect, and what was dropped

Every dialogue is tagged with its aspect and carries in `meta.checks` what each of its replies must be. The builder holds its own
replies against these checks, and its dialogues against the filters, before it writes them.

What is held out are texts, voices and recordings, not wordings: the splits ask in the same words, for a model that starts from
nothing knows no others, and its compact vocabulary has none.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from step_megatron.data.dialogues.heard import Pool, read_clips
from step_megatron.data.dialogues.scenarios import SCENARIOS, Dialogue
from step_megatron.data.filters import FILTERS, first_reason
from step_megatron.data.recipes.check import disjoint
from step_megatron.data.recipes.clip import normalise
from step_megatron.data.schema import SPLITS, Audio, Conversation, write_conversations
from step_megatron.data.template import encoded_texts
from step_megatron.data.tokenizer import compact_limit, extend_compact
from step_megatron.runtime.folders import whole_folder

SOURCE = "dialogues"
# Dialogues of each aspect.
COUNTS = {"train": 300, "validation": 16, "test": 100}
# Draws without a new dialogue after which a split has too few clips for what is asked.
_FRUITLESS = 500


class DialogueError(ValueError):
    """The data set cannot give the dialogues; the message says what to do."""


def build_dialogues(open_speech: str | Path, out: str | Path, seed: int = 1, counts: dict[str, int] | None = None) -> dict:
    """Write the dialogues, whole or not at all; an earlier folder of dialogues is replaced.

    Args:
        open_speech: folder that `data build` wrote.
        out: folder to write; addresses of clips are relative to it.
        counts: dialogues of each aspect by split.

    Returns:
        The summary that `SUMMARY.json` holds.

    Raises:
        SchemaError: `open_speech` is not a data set.
        DialogueError: a split has too few clips, or `out` holds something else.
        SplitError: two splits share a text, a group or a clip.
    """
    open_speech, out = Path(open_speech), Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "SUMMARY.json").is_file():
        raise DialogueError(f"{out} exists and holds no dialogues; name another folder by --out")
    dropped: Counter[str] = Counter()
    counts = counts or COUNTS
    made = {split: list(_of_split(open_speech, split, counts[split], seed, dropped)) for split in SPLITS}
    for kind in ("text", "group", "clip"):
        disjoint(kind, {split: {name for each in made[split] for name in each.meta[f"{kind}s"]} for split in SPLITS})
    summary = {
        "open_speech": os.path.relpath(open_speech, out),
        "seed": seed,
        "dialogues": {split: dict(Counter(each.meta["task"] for each in made[split])) for split in SPLITS},
        "turns": {split: sum(len(each.turns) for each in made[split]) for split in SPLITS},
        "dropped": dict(dropped),
    }
    with whole_folder(out) as folder:
        for split in SPLITS:
            write_conversations(folder / f"{split}.jsonl", (_moved(each, open_speech, out) for each in made[split]))
        tokenizer = open_speech / "tokenizer"
        if (limit := compact_limit(tokenizer)) is not None:
            texts = (text for each in made["train"] for text in encoded_texts(each))
            extend_compact(tokenizer, texts, folder / "tokenizer", limit)
        (folder / "SUMMARY.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def _of_split(open_speech: Path, split: str, count: int, seed: int, dropped: Counter[str]) -> Iterator[Conversation]:
    """Dialogues of a split, `count` of each aspect, its kinds in turn, in a drawn order; what is dropped is counted."""
    clips = {clip.address: clip for clip in read_clips(open_speech, split)}
    pool = Pool(clips.values())
    if not pool.tasks:
        raise DialogueError(f"{open_speech}/{split}.jsonl: no task has clips of two labels; build the data set with more clips")
    rng = random.Random(f"{seed}:dialogues:{split}")
    seen: set[tuple] = set()
    made = []
    for aspect in dict.fromkeys(aspect for aspect, _ in SCENARIOS):
        kinds = [kind for of, kind in SCENARIOS if of == aspect]
        fruitless = number = 0
        while number < count:
            dialogue = _draw(pool, aspect, kinds[number % len(kinds)], rng)
            reason = "no clips" if dialogue is None else problem(dialogue, seen)
            if reason:
                dropped[reason] += 1
                fruitless += 1
                if fruitless > _FRUITLESS:
                    raise DialogueError(f"{open_speech}: too few clips of the {split} split for {count} dialogues of {aspect}")
                continue
            fruitless, number = 0, number + 1
            seen.add(tuple(dialogue.turns))
            addresses = dict.fromkeys(item.address for turn in dialogue.turns for item in turn.content if isinstance(item, Audio))
            heard = [clips[address] for address in addresses]
            task = f"{aspect}.{kinds[(number - 1) % len(kinds)]}".removesuffix(".")
            made.append(_conversation(f"{split}-{task}-{number:04d}", split, task, dialogue, heard))
    rng.shuffle(made)
    yield from made


def _draw(pool: Pool, aspect: str, kind: str, rng: random.Random) -> Dialogue | None:
    """A dialogue of a scenario; None where the clips drawn cannot bear it (too few of a label, or without a pitch)."""
    dialogue = Dialogue(pool, rng.choice(pool.tasks))
    try:
        SCENARIOS[aspect, kind](dialogue, rng)
    except (IndexError, KeyError):
        return None
    return dialogue


def problem(dialogue: Dialogue, seen: set[tuple]) -> str | None:
    """Why a dialogue must not be written: it exists already, a reply fails its own check, or a filter would drop it."""
    if tuple(dialogue.turns) in seen:
        return "duplicate"
    replies = [turn.text for turn in dialogue.turns if turn.role == "assistant"]
    for reply, check in zip(replies, dialogue.checks, strict=True):
        if check is not None and not check.passes(reply):
            return "check failed"
    reason = first_reason(Conversation("", "", tuple(dialogue.turns)), FILTERS)
    return reason and reason.partition(":")[0]


def _conversation(name: str, split: str, task: str, dialogue: Dialogue, heard: list) -> Conversation:
    aspect, _, kind = task.partition(".")
    meta = {
        "split": split,
        "task": task,
        "answer": dialogue.answer,
        "aspect": aspect,
        **({"aspect_kind": kind} if kind else {}),
        "checks": [check and check.record() for check in dialogue.checks],
        "asked": dialogue.task,
        "corpora": sorted({clip.corpus for clip in heard}),
        "texts": sorted({normalise(clip.text) for clip in heard} - {""}),
        "groups": sorted({clip.group for clip in heard}),
        "clips": [clip.address for clip in heard],
        "licences": sorted({clip.licence for clip in heard}),
    }
    return Conversation(name, SOURCE, tuple(dialogue.turns), meta)


def _moved(conversation: Conversation, open_speech: Path, out: Path) -> Conversation:
    """Addresses as seen from the dialogues' folder."""
    prefix = os.path.relpath(open_speech, out)

    def place(address: str) -> str:
        return os.path.normpath(os.path.join(prefix, address))

    turns = tuple(
        replace(turn, content=tuple(Audio(place(item.address)) if isinstance(item, Audio) else item for item in turn.content))
        for turn in conversation.turns
    )
    return replace(
        conversation, turns=turns, meta={**conversation.meta, "clips": [place(clip) for clip in conversation.meta["clips"]]}
    )
