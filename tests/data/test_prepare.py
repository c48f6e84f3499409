"""From archives to a data set: the vocabulary is complete or absent, and is that of the limit asked for."""

import json

import pytest

from step_megatron.data import prepare, tokenizer
from step_megatron.data.schema import Conversation, Text, Turn, write_conversations
from step_megatron.data.tokenizer import SPECIALS, Tokenizer

SMALLEST = len(SPECIALS) + 256


@pytest.fixture
def make(tiktoken_path, tmp_path, monkeypatch):
    """`make(vocabulary)` prepares a data set whose conversations are there already; the folder of its vocabulary."""
    data, out = tmp_path / "data", tmp_path / "data/open-speech"
    (data / "qwen").mkdir(parents=True)
    (data / "qwen/qwen.tiktoken").symlink_to(tiktoken_path)
    out.mkdir()
    turns = (Turn("human", (Text("What is said?"),)), Turn("assistant", (Text("because because said"),)))
    for name in ("train", "text_train"):
        write_conversations(out / f"{name}.jsonl", [Conversation(name, "s", turns)])
    monkeypatch.setattr(prepare, "build", lambda *_: {})

    def make(vocabulary: int, **settings):
        prepare.prepare(data, out, 100.0, vocabulary, seed=1, **settings)
        return out / "tokenizer"

    return make


def test_a_vocabulary_is_kept_until_another_limit_is_asked_for(make):
    folder = make(SMALLEST + 2)
    assert Tokenizer.load(folder).size == SMALLEST + 2
    before = (folder / "compact.json").stat().st_mtime_ns
    make(SMALLEST + 2)
    assert (folder / "compact.json").stat().st_mtime_ns == before
    assert Tokenizer.load(make(SMALLEST + 1)).size == SMALLEST + 1


def test_a_limit_that_the_corpus_does_not_fill_is_kept_as_well(make):
    folder = make(5000)
    before = (folder / "compact.json").stat().st_mtime_ns
    assert (make(5000) / "compact.json").stat().st_mtime_ns == before


def test_an_interrupted_vocabulary_is_made_again(make, monkeypatch):
    """Killed between the copy of the ranks and the id map: what is there would be read as the whole Qwen vocabulary."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.Tokenizer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            make(SMALLEST + 2)
    folder = make(SMALLEST + 2)
    assert Tokenizer.load(folder).is_compact and json.loads((folder / "compact.json").read_text())["limit"] == SMALLEST + 2
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_half_a_vocabulary_of_an_earlier_release_is_made_again(make):
    folder = make(SMALLEST + 2)
    (folder / "compact.json").unlink()
    assert Tokenizer.load(make(SMALLEST + 2)).is_compact


def test_what_later_stages_train_on_is_in_the_vocabulary_too(make):
    """A word that the conversations have not is one token when another stage's do."""
    later = Conversation("later", "s", (Turn("human", (Text("Hello Hello Hello"),)),))
    folder = make(SMALLEST + 40)
    assert len(Tokenizer.load(folder).encode("Hello")) > 1
    with_later = make(SMALLEST + 41, more=lambda out_dir: [later])
    assert len(Tokenizer.load(with_later).encode("Hello")) == 1
