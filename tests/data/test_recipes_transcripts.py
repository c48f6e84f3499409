"""The data set of transcripts: splits as those of the whole data set, a file a language, replies as error rates compare them."""

import json

import pytest
from data.test_recipes_build import make_sources

from step_megatron.data.recipes.clip import normalise, split_of
from step_megatron.data.recipes.transcripts import build_transcripts
from step_megatron.data.schema import SPLITS, read_conversations
from step_megatron.evaluation.scoring import normalise_transcript
from step_megatron.evaluation.tasks import read_items


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "transcripts"
    return out, build_transcripts(data, out, ["en", "it"], seed=3)


def test_splits_share_no_text_and_are_those_of_the_seed(made):
    out, summary = made
    texts = {split: {normalise(c.meta["text"]) for c in read_conversations(out / f"{split}.jsonl")} for split in SPLITS}
    assert (
        all(texts.values()) and not texts["train"] & texts["test"] and not texts["validation"] & (texts["train"] | texts["test"])
    )
    assert all(split_of(3, text) == split for split, own in texts.items() for text in own)
    # Sixty prompts a language, twelve of them the same text in all.
    assert sum(summary["clips"].values()) == 120 and summary["audio_seconds"] == 120.0


def test_each_language_has_a_file_and_all_are_in_one(made):
    out, summary = made
    own = {name: [c.id for c in read_conversations(out / f"train_{name}.jsonl")] for name in ("en", "it")}
    assert sorted(own["en"] + own["it"]) == sorted(c.id for c in read_conversations(out / "train.jsonl"))
    assert {name: len(ids) for name, ids in own.items()} == summary["languages"]["train"]
    assert all(c.meta["language"] == "it" for c in read_conversations(out / "train_it.jsonl"))


def test_a_reply_is_what_error_rates_compare(made):
    out, _ = made
    for c in read_conversations(out / "train.jsonl"):
        question, reply = c.turns
        assert len(c.audio_addresses()) == 1 and (out / c.audio_addresses()[0]).is_file() and question.text
        assert normalise_transcript(reply.text) == reply.text == normalise_transcript(c.meta["answer"])
        assert reply.reasoning == {"en": "English", "it": "Italian"}[c.meta["language"]]
    items = read_items(out)
    assert {item.kind for item in items} == {"transcription"} and {item.language for item in items} == {"en", "it"}
    assert {file.name for file in (out / "LICENCES").iterdir()} == {f"asterisk-core-sounds-{name}.txt" for name in ("en", "it")}


def test_it_is_made_once_and_what_is_missing_is_named(data, made, tmp_path):
    out, summary = made
    before = (out / "train.jsonl").stat().st_mtime_ns
    assert build_transcripts(data, out, ["en", "it"], seed=3) == summary == json.loads((out / "SUMMARY.json").read_text())
    assert (out / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="no prompts in de; run `step-megatron data fetch --group asterisk`"):
        build_transcripts(data, tmp_path / "other", ["en", "de"])
    assert not list(tmp_path.iterdir()) or not (tmp_path / "other").exists()
    # Each prompt is a second long.
    with pytest.raises(ValueError, match="no prompt"):
        build_transcripts(data, tmp_path / "other", ["en"], seconds=(2.0, 3.0))
