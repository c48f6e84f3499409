"""Constructed preferences: levels follow from what the replies are, length does not give them away, splits share nothing."""

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.audio.address import parse_address
from step_megatron.data.preferences import read_preferences
from step_megatron.data.recipes.clip import normalise, split_of
from step_megatron.data.recipes.preferences import CRITERIA, Reply, build_preferences, plain_level, preferences, rubric_levels
from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations

LANGUAGES = ("English", "French", "Italian", "Russian", "Spanish")
replies = st.builds(Reply, st.just("x"), st.booleans(), st.sampled_from(["sentence", "bare"]))


def conversations(split: str, count: int = 400) -> list[Conversation]:
    """Clips of a split, each asked for its language, every second one then for the words and every third for the voice."""
    made = []
    for number in range(count):
        text, language = f"text number {number}", LANGUAGES[number % 5]
        if split_of(1, normalise(text)) != split:
            continue
        turns = [Turn("human", (Audio(f"audio/{number}.wav"), Text("Which language is this?")))]
        turns.append(Turn("assistant", (Text(language),), reasoning="1.0 s, high pitch"))
        labels = {"language": language}
        if number % 2:
            labels["transcription"] = text
            turns += [Turn("human", (Text("What is said?"),)), Turn("assistant", (Text(text),), reasoning="1.0 s, " + language)]
        if not number % 3:
            labels["gender"] = voice = ("male", "female")[number % 2]
            turns += [Turn("human", (Text("Which voice?"),)), Turn("assistant", (Text(voice),), reasoning="1.0 s, high pitch")]
        meta = {"split": split, "text": text, "group": f"text:{text}", "labels": labels}
        made.append(Conversation(f"c{number}", "asterisk", tuple(turns), meta))
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open-speech")
    for split in ("train", "validation", "test"):
        write_conversations(folder / f"{split}.jsonl", conversations(split))
    counts = build_preferences(folder, seed=1)
    found = {split: read_preferences(folder / f"preferences/{split}.jsonl") for split in counts}
    assert counts == {split: len(records) for split, records in found.items()}
    return folder, found


@given(replies, replies, st.sampled_from([("right",), ("sentence",), ("bare",), ("right", "bare"), ("right", "sentence")]))
def test_levels_turn_with_the_order_and_equal_replies_tie(first, second, rubric):
    assert plain_level(first, second) == -plain_level(second, first)
    assert rubric_levels(rubric, first, second) == rubric_levels(rubric, second, first).swapped()
    assert plain_level(first, first) == rubric_levels(rubric, first, first).overall == 0


def test_being_right_is_worth_more_than_any_form_unless_the_rubric_says_otherwise():
    forms = ("sentence", "bare")
    for ours, theirs in product(forms, forms):
        assert plain_level(Reply("", True, ours), Reply("", False, theirs)) > 0
    wrong_sentence, right_bare = Reply("", False, "sentence"), Reply("", True, "bare")
    assert rubric_levels(("sentence",), wrong_sentence, right_bare).overall == 3
    assert rubric_levels(("bare",), wrong_sentence, right_bare).overall == -3
    assert rubric_levels(("right",), wrong_sentence, right_bare).overall == -3
    assert rubric_levels(("right", "sentence"), wrong_sentence, right_bare).overall == 0
    assert rubric_levels(("right", "bare"), wrong_sentence, right_bare).overall == -3
    assert rubric_levels(("right", "bare"), Reply("", True, "sentence"), right_bare).overall == -2


def test_records_say_what_their_replies_are(built):
    """Read back from the text alone: who holds the right answer, in which form."""
    for preference in built[1]["train"]:
        answer, verdict = preference.meta["answer"], preference.verdict
        said = (preference.response, preference.reference)
        right = [f" {answer} " in f" {reply.rstrip('.')} " for reply in said]
        sentence = [reply.endswith(".") for reply in said]
        if not preference.rubric:
            assert verdict.overall == (3 * (right[0] - right[1]) or sentence[0] - sentence[1])
        if preference.rubric == (CRITERIA["right"],):
            assert verdict.overall == 3 * (right[0] - right[1])
        if preference.rubric == (CRITERIA["bare"],):
            assert verdict.overall == 3 * (sentence[1] - sentence[0])
        *lines, heard, judged = preference.reasoning.split("\n")
        for line, name, reply, is_sentence in zip(lines, ("response", "reference"), said, sentence, strict=True):
            what, form = line.removeprefix(f"{{{name}}}: ").split(", ")
            assert what in reply and form == ("sentence" if is_sentence else "bare")
        assert heard.endswith(f": {answer}") and preference.reference_from == "data"
        assert judged == "right: " + {3: "both", 2: "{response}", 1: "{reference}", 0: "neither"}[2 * right[0] + right[1]]


def test_every_level_occurs_and_length_alone_says_little(built):
    train = built[1]["train"]
    assert {p.verdict.overall for p in train} == set(range(-3, 4))
    assert 0.3 < sum(bool(p.rubric) for p in train) / len(train) < 0.7
    decided = [p for p in train if p.verdict.overall]
    longer = sum((len(p.response) > len(p.reference)) == (p.verdict.overall > 0) for p in decided) / len(decided)
    assert 0.35 < longer < 0.65
    assert 0.4 < sum(p.verdict.overall > 0 for p in decided) / len(decided) < 0.6


def test_no_transcript_is_in_two_splits_and_wrong_answers_come_from_the_own_split(built):
    texts = {split: {normalise(p.meta["text"]) for p in records} for split, records in built[1].items()}
    assert not (texts["train"] & texts["validation"] or texts["train"] & texts["test"] or texts["validation"] & texts["test"])
    for split, records in built[1].items():
        foreign = set().union(*(texts[other] for other in texts if other != split))
        for p in records:
            assert not {normalise(reply) for reply in (p.response, p.reference)} & foreign
            assert {turn.role for turn in p.history} <= {"human", "assistant"} and p.history[-1].role == "human"


def test_records_name_the_clips_of_the_conversations(built):
    folder, found = built
    for preference in found["test"]:
        (address,) = [item.address for turn in preference.history for item in turn.content if isinstance(item, Audio)]
        assert parse_address(address, folder / "preferences").path.startswith(str(folder / "audio"))


def test_tasks_take_turns_and_the_same_seed_gives_the_same_records():
    asked = conversations("train")
    first, second = (list(preferences(asked, 60, random.Random(5))) for _ in range(2))
    assert first == second != list(preferences(asked, 60, random.Random(6)))
    assert Counter(p.meta["task"] for p in first) == {"language": 30, "gender": 30}


def test_a_task_with_few_clips_is_asked_about_again_with_other_replies():
    records = list(preferences(conversations("train", 12), 40, random.Random(1)))
    assert len(records) == len({p.id for p in records}) == 40
    replies = {(p.response, p.reference, p.rubric) for p in records if p.history == records[0].history}
    assert len(replies) > 1
