"""Dialogues about a small data set: what they ask is answered right, every reply passes its check, splits share nothing."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from step_megatron.data.aspects import ASPECTS
from step_megatron.data.checks import read_check
from step_megatron.data.dialogues import build, phrases
from step_megatron.data.dialogues.build import DialogueError, build_dialogues
from step_megatron.data.filters import FILTERS, first_reason
from step_megatron.data.recipes.check import SplitError
from step_megatron.data.schema import Audio, Conversation, Text, Turn, read_conversations, write_conversations
from step_megatron.data.tokenizer import Tokenizer, build_compact

COUNTS = {"train": 24, "validation": 4, "test": 8}
LABELS = {"language": ["English", "Italian", "Spanish"], "tone": ["first", "second", "fourth"], "gender": ["male", "female"]}


def clip(split: str, task: str, label: str, number: int) -> Conversation:
    name = f"{task}-{label}-{split}-{number}"
    turns = (
        Turn("human", (Audio(f"audio/{name}.wav"), Text("?"))),
        Turn("assistant", (Text(label),), reasoning=f"trace of {name}"),
    )
    meta = {
        "split": split, "task": task, "answer": label, "labels": {task: label}, "corpus": task, "text": f"text {name}",
        "group": f"group {name}", "seconds": 1 + number / 10, "pitch_hz": (None, 120.0, 160.0, 250.0)[number % 4],
        "licence": "free",
    }  # fmt: skip
    return Conversation(name, task, turns, meta)


@pytest.fixture(scope="module")
def open_speech(tmp_path_factory, tiktoken_path) -> Path:
    folder = tmp_path_factory.mktemp("data") / "open-speech"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        made = [clip(split, task, label, i) for task, labels in LABELS.items() for label in labels for i in range(5)]
        write_conversations(folder / f"{split}.jsonl", made)
    build_compact(["Hello there"], tiktoken_path, folder / "tokenizer", limit=400)
    return folder


@pytest.fixture(scope="module")
def made(open_speech) -> dict[str, list[Conversation]]:
    build_dialogues(open_speech, open_speech / "dialogues", seed=3, counts=COUNTS)
    return {split: read_conversations(open_speech / f"dialogues/{split}.jsonl") for split in COUNTS}


def test_every_aspect_and_kind_is_there_in_equal_shares(made, open_speech):
    for split, count in COUNTS.items():
        assert Counter(each.meta["aspect"] for each in made[split]) == dict.fromkeys(ASPECTS, count)
        tasks = Counter(each.meta["task"] for each in made[split])
        for aspect, kinds in ASPECTS.items():
            counts = [tasks[f"{aspect}.{kind}" if kind else aspect] for kind in kinds or ("",)]
            assert max(counts) - min(counts) <= 1
    summary = json.loads((open_speech / "dialogues/SUMMARY.json").read_text())
    assert {split: sum(tasks.values()) for split, tasks in summary["dialogues"].items()} == {s: 4 * n for s, n in COUNTS.items()}
    assert "check failed" not in summary["dropped"]


def test_every_reply_passes_its_check_and_fails_another_clips(made):
    for each in [each for split in made.values() for each in split]:
        replies = [turn for turn in each.turns if turn.role == "assistant"]
        for turn, record in zip(replies, each.meta["checks"], strict=True):
            assert (record is None) == (not turn.train), "only a reply that was cut off is not checked, and not trained"
            if record is not None:
                assert read_check(record).passes(turn.text), (turn.text, record)
                assert not read_check(record).passes("I do not know.")
        assert first_reason(each, FILTERS) is None


def labels_by_clip() -> dict[str, str]:
    return {
        f"{task}-{label}-{split}-{i}": label
        for task, labels in LABELS.items()
        for label in labels
        for split in COUNTS
        for i in range(5)
    }


def test_what_is_said_of_a_clip_is_its_label(made, open_speech):
    """Independent of the scenarios: after one clip alone a reply holds that clip's label, or its translation."""
    labels, spoken = labels_by_clip(), {label: {label.casefold()} for values in LABELS.values() for label in values}
    for _, words in phrases._TRANSLATIONS.values():
        for label in spoken:
            spoken[label].add(words[label].casefold())
    looked_at = 0
    for each in made["train"]:
        for before, turn in zip(each.turns, each.turns[1:], strict=False):
            clips = [item.address for item in before.content if isinstance(item, Audio)]
            if turn.role == "assistant" and len(clips) == 1:
                assert (open_speech / "dialogues" / clips[0]).resolve().parent == (open_speech / "audio").resolve()
                words = set(turn.text.casefold().replace("(", " ").replace(")", " ").replace(",", " ").replace(".", " ").split())
                assert words & spoken[labels[Path(clips[0]).stem]], (clips, turn.text)
                looked_at += 1
    assert looked_at > 100


def test_traces_are_measurements_and_a_user_may_interrupt_himself(made):
    everything = [each for split in made.values() for each in split]
    assert all(turn.reasoning for each in everything for turn in each.turns if turn.role == "assistant" and turn.train)
    assert any(a.role == b.role == "human" for each in everything for a, b in zip(each.turns, each.turns[1:], strict=False))
    ends = Counter(each.turns[-1].text.endswith("?") for each in everything if each.meta["task"].endswith("clarification"))
    assert ends[True] and ends[False], "a dialogue may end with the question back, or with the answer"


def test_a_second_build_is_the_same_and_another_seed_is_not(made, open_speech, tmp_path):
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / str(seed) / "dialogues"
        build_dialogues(open_speech, out, seed=seed, counts=COUNTS)
        again = read_conversations(out / "train.jsonl")
        assert ([each.meta["checks"] for each in again] == [each.meta["checks"] for each in made["train"]]) is same


def test_splits_that_share_a_text_are_refused(open_speech, tmp_path):
    for split in COUNTS:
        conversations = read_conversations(open_speech / f"{split}.jsonl")
        shared = [replace(each, meta={**each.meta, "text": "the same"}) for each in conversations]
        write_conversations(tmp_path / f"{split}.jsonl", shared)
    with pytest.raises(SplitError, match="train and validation share 1 texts, such as 'the same'"):
        build_dialogues(tmp_path, tmp_path / "dialogues", counts=COUNTS)
    assert not (tmp_path / "dialogues").exists()


def test_a_wrong_reply_is_dropped_and_counted(open_speech, tmp_path, monkeypatch):
    """The builder's checks are not decoration: half of all sentences are made wrong."""
    right = build.SCENARIOS["naturalness", ""]

    def wrong(dialogue, rng):
        right(dialogue, rng)
        if rng.random() < 0.5:
            dialogue.turns[-1] = replace(dialogue.turns[-1], content=(Text("This time, this is purple."),))

    monkeypatch.setitem(build.SCENARIOS, ("naturalness", ""), wrong)
    summary = build_dialogues(open_speech, tmp_path / "dialogues", counts=COUNTS)
    assert summary["dropped"]["check failed"] > 5 and summary["dialogues"]["train"]["naturalness"] == COUNTS["train"]
    assert not [each for each in read_conversations(tmp_path / "dialogues/train.jsonl") if "purple" in each.turns[-1].text]


def test_too_few_clips_and_a_foreign_folder_are_said(open_speech, tmp_path):
    for split in COUNTS:
        two = [clip(split, "gender", label, 1) for label in LABELS["gender"]]
        write_conversations(tmp_path / f"{split}.jsonl", two)
    with pytest.raises(DialogueError, match="too few clips of the train split for 24 dialogues of continuity"):
        build_dialogues(tmp_path, tmp_path / "new", counts=COUNTS)
    write_conversations(tmp_path / "train.jsonl", two[:1])
    with pytest.raises(DialogueError, match=r"train\.jsonl: no task has clips of two labels"):
        build_dialogues(tmp_path, tmp_path / "new", counts=COUNTS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(DialogueError, match="exists and holds no dialogues"):
        build_dialogues(open_speech, tmp_path / "mine", counts=COUNTS)


def test_the_vocabulary_grows_behind_what_it_was(made, open_speech):
    old, new = Tokenizer.load(open_speech / "tokenizer"), Tokenizer.load(open_speech / "dialogues/tokenizer")
    assert new.size > old.size and new.specials == old.specials
    assert all(new.token_bytes(number) == old.token_bytes(number) for number in range(old.size))
    assert new.decode(new.encode("Hello, 你好")) == "Hello, 你好"
