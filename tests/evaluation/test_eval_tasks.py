"""Held-out items: errors that say where, a control that never keeps the label, a repeatable draw."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations
from step_megatron.evaluation.tasks import (
    Labelled,
    group_by_task,
    limit_items,
    majority_label,
    other_clip_donors,
    read_items,
    read_labels,
    to_item,
    training_task,
    with_audio,
)


def conversation(name: str, task: str = "language", answer: str = "Italian", clips: tuple[str, ...] = ("a.wav",)) -> Conversation:
    question = Turn("human", (*map(Audio, clips), Text("Which language?")))
    return Conversation(
        name, "test", (question, Turn("assistant", (Text(answer),), "facts")), {"task": task, "answer": answer, "split": "test"}
    )


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=40), st.integers(0, 5))
def test_other_clip_never_keeps_the_label(labels, seed):
    donors = other_clip_donors(labels, seed)
    if len(set(labels)) == 1:
        assert donors is None
        return
    assert all(labels[donor] != label for donor, label in zip(donors, labels, strict=True))
    assert donors == other_clip_donors(labels, seed)
    if 2 * max(Counter(labels).values()) <= len(labels):
        assert sorted(donors) == list(range(len(labels)))


def test_other_clip_compares_labels_as_scoring_does():
    assert other_clip_donors(["Italian", "italian."], 0) is None


def test_other_clip_mixes_the_labels():
    labels = list("abcde") * 20
    donors = other_clip_donors(labels, 1)
    heard = Counter(labels[donor] for donor, label in zip(donors, labels, strict=True) if label == "a")
    assert set(heard) == set("bcde")
    assert donors != other_clip_donors(labels, 2)


def test_item_leaves_the_answer_out():
    item = to_item(conversation("x"), "test.jsonl")
    assert [turn.role for turn in item.conversation.turns] == ["human"]
    assert (item.answer, item.reasoning, item.audio, item.question, item.kind) == (
        "Italian",
        "facts",
        ("a.wav",),
        "Which language?",
        "classification",
    )
    assert to_item(conversation("x", clips=()), "t").kind == "text_only"
    assert to_item(conversation("x", task="transcription"), "t").kind == "transcription"


def test_errors_name_file_conversation_and_field(tmp_path):
    broken = conversation("no-answer")
    del broken.meta["answer"]
    write_conversations(tmp_path / "test.jsonl", [broken])
    with pytest.raises(ValueError, match=r"test\.jsonl: conversation 'no-answer' has no meta\.answer"):
        read_items(tmp_path)
    open_end = Conversation("open", "s", (Turn("human", (Text("?"),)),), {"task": "t", "answer": "a"})
    with pytest.raises(ValueError, match="'open' must end with the assistant turn"):
        to_item(open_end, "f")


def test_text_only_file_is_read_too_and_ids_are_unique(tmp_path):
    write_conversations(tmp_path / "test.jsonl", [conversation("a")])
    write_conversations(tmp_path / "text_test.jsonl", [conversation("b", task="sums", clips=())])
    assert [item.id for item in read_items(tmp_path)] == ["a", "b"]
    write_conversations(tmp_path / "text_test.jsonl", [conversation("a", task="sums", clips=())])
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        read_items(tmp_path)


def test_task_of_two_kinds_is_refused():
    items = [to_item(conversation("a"), "f"), to_item(conversation("b", clips=()), "f")]
    with pytest.raises(ValueError, match="'language' mixes"):
        group_by_task(items)


def test_limit_is_a_repeatable_draw_in_file_order():
    items = [to_item(conversation(f"i{k}"), "f") for k in range(50)]
    kept = limit_items(items, 10, seed=3)
    assert len(kept) == 10 and kept == limit_items(items, 10, seed=3) != limit_items(items, 10, seed=4)
    assert [items.index(item) for item in kept] == sorted(items.index(item) for item in kept)
    assert {item.id for item in limit_items(items[::-1], 10, seed=3)} == {item.id for item in kept}
    assert limit_items(items, 0, 0) == limit_items(items, 50, 0) == items


def test_with_audio_changes_the_clips_and_nothing_else():
    before = conversation("x", clips=("a.wav", "b.wav"))
    after = with_audio(before, ["c.wav"])
    assert after.audio_addresses() == ("c.wav", "c.wav")
    assert with_audio(after, ["a.wav", "b.wav"]) == before


def test_majority_and_training_task():
    assert majority_label(["b", "A", "a.", "b"]) == "a"
    assert majority_label([]) is None
    assert training_task("language_other_corpus", ["language"]) == "language"
    assert training_task("language_other_corpus", ["language", "language_other_corpus"]) == "language_other_corpus"
    assert training_task("tone", ["language"]) == "tone"


def test_train_labels_are_all_that_a_conversation_gives(tmp_path):
    several = conversation("a", task="language", answer="fr")
    several.meta["labels"] = {"language": "fr", "gender": "female"}
    nothing = Conversation("n", "s", (Turn("human", (Text("?"),)), Turn("assistant", (Text("!"),))))
    write_conversations(tmp_path / "train.jsonl", [several, conversation("b"), nothing])
    write_conversations(tmp_path / "text_train.jsonl", [conversation("c", task="sums", answer="4", clips=())])
    assert read_labels(tmp_path) == [
        Labelled("language", "fr", ("a.wav",)),
        Labelled("gender", "female", ("a.wav",)),
        Labelled("language", "Italian", ("a.wav",)),
        Labelled("sums", "4", ()),
    ]
    several.meta["labels"] = ["fr"]
    write_conversations(tmp_path / "train.jsonl", [several])
    with pytest.raises(ValueError, match=r"train\.jsonl: conversation 'a': meta\.labels"):
        read_labels(tmp_path)
