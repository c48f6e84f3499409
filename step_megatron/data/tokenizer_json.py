"""Hugging Face's tokenizer files (`tokenizer.json`) behind the interface of `Tokenizer`, without transformers.

Byte-level BPE only (Qwen2.5, Step-Audio, SmolLM2, Llama 3), for which an id has bytes. All added tokens are specials: they
exist only as ids, so they are taken out before text is encoded.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from step_megatron.data.tokenizer import Tokenizer, TokenizerError, check_text

FILE = "tokenizer.json"
# Names that this project's templates use -> names of the same tokens in Qwen2-Audio's files.
ALIASES = {"<audio_start>": "<|audio_bos|>", "<audio_patch>": "<|AUDIO|>", "<audio_end>": "<|audio_eos|>"}


class JsonTokenizer(Tokenizer):
    """A tokenizer of `tokenizer.json`; made by `Tokenizer.load`.

    Raises:
        TokenizerError: a damaged file, another kind of tokenizer, specials that clash, or none to pad with.
    """

    def __init__(self, directory: Path):
        path = directory / FILE
        text = path.read_text(encoding="utf-8")
        tree = _object(path, text)
        if tree.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(tree.get("pre_tokenizer")):
            raise TokenizerError(f"{path}: not byte-level BPE, as Qwen's, Step-Audio's and SmolLM2's are; use such a model")
        names = _specials(directory, tree)
        self._encoder = _encoder(path, tree | {"added_tokens": []})
        self._vocabulary = {number: token for token, number in self._encoder.get_vocab(with_added_tokens=False).items()}
        for name, number in names.items():
            if self._vocabulary.get(number, name) != name:
                raise TokenizerError(f"{path}: id {number} is the special {name!r} and the text {self._vocabulary[number]!r}")
        self._names = {number: name for name, number in names.items()}
        self.specials = names | {name: names[other] for name, other in ALIASES.items() if other in names and name not in names}
        self.size = max([*self._vocabulary, *self._names]) + 1
        self.pad_id = self._pad(directory)
        self._text_ids = None
        self._digest = hashlib.sha256(json.dumps([text, sorted(names.items())]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        check_text(text)
        return self._encoder.encode(text, add_special_tokens=False).ids

    def token_bytes(self, number: int) -> bytes:
        if number in self._names:
            return self._names[number].encode()
        token = self._vocabulary.get(number)
        alphabet = _alphabet()
        if token is None or any(character not in alphabet for character in token):
            return "\ufffd".encode()
        return bytes(alphabet[character] for character in token)

    def fingerprint(self) -> str:
        return self._digest

    def _pad(self, directory: Path) -> int:
        path = directory / "tokenizer_config.json"
        said = _object(path, path.read_text(encoding="utf-8")) if path.is_file() else {}
        for token in ("<|endoftext|>", said.get("pad_token"), said.get("eos_token")):
            name = token.get("content") if isinstance(token, dict) else token
            if name in self.specials:
                return self.specials[name]
        raise TokenizerError(f"{directory}: no special <|endoftext|>, and tokenizer_config.json names no pad_token or eos_token")


def add_specials(directory: Path, added: Mapping[str, int]) -> None:
    """Add special tokens to the files of a directory; their ids follow those there are, for the library counts on from them."""
    path = directory / FILE
    tree = _object(path, path.read_text(encoding="utf-8"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [*tree.get("added_tokens", []), *({"id": n, "content": name, **plain} for name, n in added.items())]
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    other = directory / "added_tokens.json"
    if other.is_file():
        known = _object(other, other.read_text(encoding="utf-8"))
        other.write_text(json.dumps(known | dict(added), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _specials(directory: Path, tree: dict[str, Any]) -> dict[str, int]:
    """Name -> id of all added tokens; the two files that may list them must agree."""
    said: list[tuple[str, int, Path]] = []
    try:
        said += [(token["content"], int(token["id"]), directory / FILE) for token in tree.get("added_tokens") or []]
        path = directory / "added_tokens.json"
        if path.is_file():
            said += [(name, int(n), path) for name, n in _object(path, path.read_text(encoding="utf-8")).items()]
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{directory}: an added token is not understood ({error!r}); fetch the tokenizer again") from error
    ids: dict[str, tuple[int, Path]] = {}
    names: dict[int, tuple[str, Path]] = {}
    for name, number, path in said:
        other, where = ids.setdefault(name, (number, path))
        if other != number:
            raise TokenizerError(f"{name!r} is {other} in {where} and {number} in {path}; keep the files of one model only")
        other_name, where = names.setdefault(number, (name, path))
        if other_name != name:
            raise TokenizerError(f"id {number} is {other_name!r} in {where} and {name!r} in {path}; give one of them another id")
    return {name: number for name, (number, _) in ids.items()}


def _encoder(path: Path, tree: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(tree))
    # The library raises plain exceptions.
    except Exception as error:
        raise TokenizerError(f"{path}: the tokenizers library cannot read it ({error}); fetch it again") from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(tree, dict):
        raise TokenizerError(f"{path}: not an object; fetch it again")
    return tree


@cache
def _alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, other bytes for characters from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
