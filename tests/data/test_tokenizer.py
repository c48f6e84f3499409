"""The tokenizer: lossless for any text, specials only as ids, the compact vocabulary a faithful part of Qwen's."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.tokenizer import SPECIALS, Tokenizer, TokenizerError, build_compact

# Text that mixes what BPE cuts at: spaces, digits, contractions, scripts, specials' names, control and combining characters.
pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*SPECIALS, " ", "  ", "\n", "\r\n\n", "'ll", "e\u0301", "42", "你好", "\x00", "🙂", "recording"]),
)
texts = st.lists(pieces, max_size=8).map("".join)


@pytest.fixture(params=["full", "compact"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@given(text=texts)
def test_decoding_gives_the_text_back(full, compact, text):
    assert full.decode(full.encode(text)) == text
    assert compact.decode(compact.encode(text)) == text


@given(text=texts)
def test_text_never_becomes_a_special(full, compact, text):
    for tokenizer in (full, compact):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.specials.values())
        assert all(0 <= number < tokenizer.size for number in ids)


@given(text=texts)
def test_compact_is_full_with_rare_tokens_as_bytes(full, compact, text):
    kept = {compact.token_bytes(number): number for number in range(len(SPECIALS), compact.size)}
    expected = []
    for token in map(full.token_bytes, full.encode(text)):
        expected += [kept[token]] if token in kept else [kept[bytes([byte])] for byte in token]
    assert compact.encode(text) == expected


def test_frequent_words_are_one_token(full, compact):
    assert len(full.encode(" recording")) == len(compact.encode(" recording")) == 1
    assert full.token_bytes(full.encode(" recording")[0]) == b" recording"


def test_compact_layout(compact):
    assert compact.size <= 300 and compact.is_compact
    assert [compact.special(name) for name in SPECIALS] == list(range(len(SPECIALS)))
    first = len(SPECIALS)
    assert sorted(compact.token_bytes(number) for number in range(first, first + 256)) == [bytes([byte]) for byte in range(256)]
    assert all(len(compact.token_bytes(number)) > 1 for number in range(first + 256, compact.size))


def test_compact_keeps_the_most_frequent(tiktoken_path, tmp_path):
    few = build_compact(["said because because"], tiktoken_path, tmp_path, limit=len(SPECIALS) + 257)
    assert few.token_bytes(few.size - 1) == b" because"
    assert len(few.encode("said")) == 4


def test_compact_does_not_depend_on_the_order_of_the_corpus(tiktoken_path, tmp_path):
    texts = ["What is said", "in this recording", "Hello there"]
    one = build_compact(texts, tiktoken_path, tmp_path / "a")
    two = build_compact(reversed(texts), tiktoken_path, tmp_path / "b")
    assert (tmp_path / "a/compact.json").read_bytes() == (tmp_path / "b/compact.json").read_bytes()
    assert one.size == two.size


def test_the_fingerprint_is_of_the_ids_that_texts_get(full, tiktoken_path, tmp_path):
    once = build_compact(["What is said"], tiktoken_path, tmp_path / "once", limit=300)
    other = build_compact(["said said"], tiktoken_path, tmp_path / "other", limit=300)
    (tmp_path / "added").mkdir()
    (tmp_path / "added/qwen.tiktoken").symlink_to(tiktoken_path)
    (tmp_path / "added/added_tokens.json").write_text('{"<|BOT|>": 151700}')
    added = Tokenizer.load(tmp_path / "added")
    assert once.fingerprint() == Tokenizer.load(tmp_path / "once").fingerprint()
    assert len({each.fingerprint() for each in (once, other, full, added)}) == 4


def test_saved_directory_is_complete(compact, tiktoken_path, tmp_path):
    build_compact(["Hello there"], tiktoken_path, tmp_path / "a")
    loaded = Tokenizer.load((tmp_path / "a").rename(tmp_path / "moved"))
    assert loaded.decode(loaded.encode("Hello <|EOT|> 你")) == "Hello <|EOT|> 你"
    record = json.loads((tmp_path / "moved/compact.json").read_text())
    assert record["qwen_ids"][record["specials"]["<|EOT|>"]] == 151665


def test_published_ids(full):
    published = {
        "<|im_start|>": 151644,
        "<|EOT|>": 151665,
        "<audio_start>": 151688,
        "<audio_patch>": 151690,
        "<|endoftext|>": 151643,
    }
    assert {name: full.special(name) for name in published} == published
    assert full.size == 151696 + 6562


def test_added_tokens_replace_placeholders(tiktoken_path, tmp_path):
    (tmp_path / "qwen.tiktoken").symlink_to(tiktoken_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|BOT|>": 151680, "<audio_end>": 151691, "<tool>": 151670}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.special("<|BOT|>"), tokenizer.special("<audio_end>"), tokenizer.special("<tool>")) == (
        151680,
        151691,
        151670,
    )
    assert tokenizer.decode([151680]) == "<|BOT|>"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"<other>": 151689}', "`<audio_end>` is missing and its placeholder 151689 is `<other>`"),
        ('{"<|BOT|>": 5}', "at least 151643"),
        ('{"<|BOT|>": 151690}', "must differ"),
        ("[1]", "not an object"),
        ("{", "not an object"),
    ],
)
def test_unsound_added_tokens_are_refused(tiktoken_path, tmp_path, added, message):
    (tmp_path / "qwen.tiktoken").symlink_to(tiktoken_path)
    (tmp_path / "added_tokens.json").write_text(added)
    with pytest.raises(TokenizerError, match="added_tokens.json.*" + message):
        Tokenizer.load(tmp_path)


def test_decoding_anything_a_model_may_write(tokenizer):
    special = tokenizer.special("</think>")
    assert tokenizer.decode([special]) == "</think>" and tokenizer.decode([special], skip_special=True) == ""
    assert tokenizer.decode([tokenizer.size + 5, -3]) == "\ufffd\ufffd"
    assert tokenizer.decode(tokenizer.encode("你")[:1]) == "\ufffd" or len(tokenizer.encode("你")) == 1


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate pair at 1"):
        tokenizer.encode("a\ud800")


def test_unknown_special_names_the_known_ones(tokenizer):
    with pytest.raises(KeyError, match="<audio_patch>"):
        tokenizer.special("<patch>")


def test_damaged_files_are_refused(tiktoken_path, tmp_path):
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer.load(tmp_path)
    lines = tiktoken_path.read_bytes().splitlines(keepends=True)
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(TokenizerError, match="151642 ranks"):
        Tokenizer.load(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines[:9]) + b"<html>\n")
    with pytest.raises(TokenizerError, match="qwen.tiktoken:10"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="limit is 200"):
        build_compact([], tiktoken_path, tmp_path, limit=200)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(format=2),
        lambda record: record["specials"].pop("<|EOT|>"),
        lambda record: record["qwen_ids"].append(record["qwen_ids"][-1]),
        lambda record: record["qwen_ids"].append(200_000),
        lambda record: record.pop("qwen_ids"),
    ],
)
def test_damaged_id_map_is_refused(compact, tmp_path, change):
    compact.save(tmp_path)
    path = tmp_path / "compact.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(TokenizerError, match="compact.json.*build it again"):
        Tokenizer.load(tmp_path)


def test_equals_qwen_on_known_ids(step_data):
    """Ids that Qwen2.5's own tokenizer gives (its model card and documentation), on the real vocabulary where it was fetched."""
    if not (step_data / "qwen/qwen.tiktoken").exists():
        pytest.skip("qwen.tiktoken was not fetched")
    tokenizer = Tokenizer.load(step_data / "qwen")
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("You are a helpful assistant.") == [2610, 525, 264, 10950, 17847, 13]
    assert tokenizer.encode("system\n") == [8948, 198]
