"""Hugging Face's tokenizer.json through our interface: transformers' ids, specials never made of text, clashes named."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from step_megatron.data.tokenizer import Tokenizer, TokenizerError
from step_megatron.data.tokenizer_json import add_specials

TEXTS = ("Hello world", "  naïve\tcafé\n\n\n 12345 x", "你好，世界。", "a <|im_start|>b<think>", "\u0000\x7f\xad emoji 🙂", "")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")


@pytest.fixture
def directory(tmp_path):
    """Byte-level BPE trained on a few lines; the specials follow the vocabulary."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    built.train_from_iterator(["Hello world, hello world; the cafe of the world"] * 9, trainer)
    built.add_special_tokens(list(SPECIALS))
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_those_of_transformers_where_no_special_is_in_the_text(directory):
    from transformers import PreTrainedTokenizerFast

    ours, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert not set(ids) & set(ours.specials.values()), "a special's name in a text is text"
        if "<" not in text:
            assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.size == len(theirs) and ours.pad_id == theirs.convert_tokens_to_ids("<|endoftext|>")
    assert ours.special("<think>") == theirs.convert_tokens_to_ids("<think>")
    assert not ours.is_compact
    joined = [ours.special("<|im_start|>"), *ours.encode("é"), ours.special("<|im_end|>")]
    assert ours.decode(joined) == "<|im_start|>é<|im_end|>" and ours.decode(joined, skip_special=True) == "é"
    assert ours.token_bytes(10_000) == "\ufffd".encode()
    with pytest.raises(KeyError, match="not a special token; known: <|endoftext|>"):
        ours.special("<|EOT|>")
    with pytest.raises(ValueError, match="half of a surrogate pair at 1"):
        ours.encode("a\ud800")


def test_added_specials_are_ids_for_both(directory):
    from transformers import PreTrainedTokenizerFast

    before = Tokenizer.load(directory)
    add_specials(directory, {"<audio_start>": before.size, "<audio_end>": before.size + 1})
    after, theirs = Tokenizer.load(directory), PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    assert after.size == before.size + 2 and after.special("<audio_end>") == before.size + 1
    assert theirs.convert_tokens_to_ids("<audio_end>") == before.size + 1
    assert after.fingerprint() == Tokenizer.load(directory).fingerprint() != before.fingerprint()
    assert after.encode("x<audio_start>") == before.encode("x<audio_start>")


def test_qwen2_audios_names_are_understood(directory):
    size = Tokenizer.load(directory).size
    add_specials(directory, {"<|audio_bos|>": size, "<|AUDIO|>": size + 1, "<|audio_eos|>": size + 2})
    tokenizer = Tokenizer.load(directory)
    assert [tokenizer.special(f"<audio_{name}>") for name in ("start", "patch", "end")] == [size, size + 1, size + 2]
    assert tokenizer.decode([size + 1]) == "<|AUDIO|>"


def test_clashes_name_both(directory):
    tokenizer = Tokenizer.load(directory)
    think = tokenizer.special("<think>")
    path = directory / "added_tokens.json"
    for added, message in (
        ({"<think>": 999}, rf"'<think>' is {think} in .*tokenizer.json and 999 in .*added_tokens.json"),
        ({"<other>": think}, rf"id {think} is '<think>' in .*tokenizer.json and '<other>' in .*added_tokens.json"),
        ({"<other>": tokenizer.encode("a")[0]}, r"is the special '<other>' and the text 'a'"),
        ([1], "not an object"),
        ({"<other>": "x"}, "not understood"),
    ):
        path.write_text(json.dumps(added))
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(directory)
    path.write_text(json.dumps({"<think>": think, "<|EOT|>": 400}))
    assert Tokenizer.load(directory).special("<|EOT|>") == 400


def test_other_kinds_and_damage_are_refused(directory):
    path = directory / "tokenizer.json"
    tree = json.loads(path.read_text())
    for change, message in (
        ({"model": {"type": "Unigram"}}, "not byte-level BPE"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "not byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": 3}}, "cannot read it"),
        ({"added_tokens": []}, "no special <\\|endoftext\\|>, and tokenizer_config.json names no pad_token"),
        ({"added_tokens": [{"id": 1}]}, "not understood"),
    ):
        path.write_text(json.dumps(tree | change))
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(directory)
    path.write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer.json: not JSON"):
        Tokenizer.load(directory)
