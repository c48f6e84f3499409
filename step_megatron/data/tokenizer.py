"""Text to token ids: Qwen's byte-level BPE, whole or as the small part of it that a corpus uses, plus the Step-Audio specials.

A tokenizer is a directory. It holds `qwen.tiktoken` (151,643 ranks, `base64(bytes) rank` a line) and, optionally:

- `compact.json` (written by `build_compact`): a vocabulary of a few thousand ids for small models. Ids are the specials, then the
  256 bytes, then the Qwen tokens that the corpus uses most; any other Qwen token is written as its bytes, so nothing is lost.
- `added_tokens.json` (`{"<|BOT|>": 151666, ...}`, the Hugging Face name for it): ids of the specials in the whole vocabulary.
  Without it `PUBLISHED_IDS` and `PLACEHOLDER_IDS` are used.

Or it holds Hugging Face's `tokenizer.json`: see `tokenizer_json`.

Specials exist only as ids: `encode` never makes one, whatever the text says. Text is not normalised: `decode(encode(x)) == x`.
"""

import binascii
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

# How Qwen cuts text before BPE (the `PAT_STR` of Qwen's own tokenizer).
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Ids read in the released models' files.
PUBLISHED_IDS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|EOT|>": 151665,
    "<audio_start>": 151688,
    "<audio_patch>": 151690,
}
# Not published: free ids of the released vocabulary, chosen here. Training from scratch can use any; for released weights the ids
# must come from their `added_tokens.json`.
PLACEHOLDER_IDS = {"<|BOT|>": 151666, "<think>": 151667, "</think>": 151668, "<audio_end>": 151689}
SPECIALS = (*PUBLISHED_IDS, *PLACEHOLDER_IDS)
FIRST_SPEECH_ID, SPEECH_IDS = 151696, 6562
QWEN_RANKS = 151643
COMPACT_FORMAT = 1


class TokenizerError(ValueError):
    """A tokenizer's files are missing or not what they must be; the message names the file and the remedy."""


class Tokenizer:
    """Encode and decode; make one with `Tokenizer.load`.

    Attributes:
        size: number of ids, the smallest vocabulary a model for it can have.
        specials: name -> id.
        pad_id: the id that fills padding, `<|endoftext|>`.
    """

    def __init__(self, bpe: tiktoken.Encoding, specials: dict[str, int], qwen_ids: Sequence[int] | None, size: int):
        self._bpe, self.specials, self.size = bpe, dict(specials), size
        self.pad_id = specials["<|endoftext|>"]
        self._names = {number: name for name, number in specials.items()}
        self._text_ids = (
            None if qwen_ids is None else {qwen: number for number, qwen in enumerate(qwen_ids) if number not in self._names}
        )
        self._qwen_ids = qwen_ids
        self._fallback: dict[int, tuple[int, ...]] = {}

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Load a tokenizer directory.

        Raises:
            TokenizerError: a file is missing or damaged, or the id map does not fit the vocabulary.
        """
        directory = Path(directory)
        compact = directory / "compact.json"
        if (directory / "tokenizer.json").is_file() and not compact.exists():
            from step_megatron.data.tokenizer_json import JsonTokenizer

            return JsonTokenizer(directory)
        if compact.exists():
            specials, qwen_ids = _read_compact(compact)
            size = len(qwen_ids)
        else:
            specials, qwen_ids = _read_added(directory / "added_tokens.json"), None
            size = max(FIRST_SPEECH_ID + SPEECH_IDS, max(specials.values()) + 1)
        return cls(_bpe(read_ranks(directory / "qwen.tiktoken")), specials, qwen_ids, size)

    @property
    def is_compact(self) -> bool:
        """Whether this is a corpus's part of the vocabulary."""
        return self._text_ids is not None

    def special(self, name: str) -> int:
        """Id of a special token.

        Raises:
            KeyError: no such special; the message lists those there are.
        """
        if name not in self.specials:
            raise KeyError(f"{name!r} is not a special token; known: {', '.join(self.specials)}")
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which never holds a special token: a special's name is encoded as ordinary text.

        Raises:
            ValueError: half of a surrogate pair, which UTF-8 cannot hold.
        """
        check_text(text)
        qwen = self._bpe.encode_ordinary(text)
        if self._text_ids is None:
            return qwen
        ids: list[int] = []
        for token in qwen:
            number = self._text_ids.get(token)
            if number is None:
                ids.extend(self._bytes_of(token))
            else:
                ids.append(number)
        return ids

    def _bytes_of(self, token: int) -> tuple[int, ...]:
        """A Qwen token outside the compact vocabulary as the ids of its bytes."""
        if token not in self._fallback:
            data = self._bpe.decode_single_token_bytes(token)
            self._fallback[token] = tuple(self._text_ids[self._bpe.encode_single_token(bytes([byte]))] for byte in data)
        return self._fallback[token]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`. Specials appear by name unless skipped; what is not UTF-8, or an id without text, becomes U+FFFD."""
        data = bytearray()
        for number in ids:
            number = int(number)
            if number not in self._names:
                data += self.token_bytes(number)
            elif not skip_special:
                data += self._names[number].encode()
        return data.decode("utf-8", errors="replace")

    def token_bytes(self, number: int) -> bytes:
        """The bytes of one id: a special's name, a text token's bytes, U+FFFD for an id without text (speech, padding)."""
        if number in self._names:
            return self._names[number].encode()
        qwen = number
        if self._qwen_ids is not None:
            qwen = self._qwen_ids[number] if 0 <= number < self.size else -1
        return self._bpe.decode_single_token_bytes(qwen) if 0 <= qwen < QWEN_RANKS else "\ufffd".encode()

    def fingerprint(self) -> str:
        """Hash of all that the ids of a text depend on."""
        ids = json.dumps([sorted(self.specials.items()), None if self._qwen_ids is None else list(self._qwen_ids)])
        ranks = self._bpe.decode_tokens_bytes(range(QWEN_RANKS))
        return hashlib.sha256(b"\0".join([ids.encode(), *ranks])).hexdigest()

    def save(self, directory: str | Path, limit: int | None = None) -> None:
        """Write the id map of a compact vocabulary to `directory`/compact.json, atomically; `limit` is what it was made with."""
        record = {"format": COMPACT_FORMAT, "limit": limit, "specials": self.specials, "qwen_ids": list(self._qwen_ids)}
        path = Path(directory) / "compact.json"
        partial = path.with_name("compact.json.partial")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(path)


def check_text(text: str) -> None:
    """Refuse text that cannot be written in UTF-8.

    Raises:
        ValueError: half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds half of a surrogate pair at {error.start}; remove it or write the whole character"
        ) from error


def build_compact(texts: Iterable[str], tiktoken_path: str | Path, out_dir: str | Path, limit: int = 4096) -> Tokenizer:
    """Make a compact tokenizer for a corpus and write its directory.

    Args:
        texts: every text of the corpus, in the pieces that the template encodes (a turn's text, a reasoning trace).
        tiktoken_path: `qwen.tiktoken`; copied into `out_dir`, so that the directory is complete.
        limit: most ids; at least the specials and the 256 bytes.

    Raises:
        TokenizerError: `limit` is too small, or the ranks cannot be read.
    """
    if limit < len(SPECIALS) + 256:
        raise TokenizerError(
            f"a compact vocabulary needs {len(SPECIALS) + 256} ids for specials and bytes; limit is {limit}: raise it"
        )
    ranks, every = read_ranks(Path(tiktoken_path)), {**PUBLISHED_IDS, **PLACEHOLDER_IDS}
    start = [*(every[name] for name in SPECIALS), *(ranks[bytes([byte])] for byte in range(256))]
    specials = {name: number for number, name in enumerate(SPECIALS)}
    return _write_compact(specials, start, texts, Path(tiktoken_path), Path(out_dir), limit)


def extend_compact(directory: str | Path, texts: Iterable[str], out_dir: str | Path, limit: int) -> Tokenizer:
    """Write a compact tokenizer with all ids of another one and, behind them, the tokens of more texts that it lacks.

    What was trained with the other one reads and writes the same ids as before; new ids need rows that the model has not used.

    Args:
        directory: a compact tokenizer's.
        limit: most ids altogether.

    Raises:
        TokenizerError: `directory` is no compact tokenizer.
    """
    specials, qwen_ids = _read_compact(Path(directory) / "compact.json")
    return _write_compact(specials, qwen_ids, texts, Path(directory) / "qwen.tiktoken", Path(out_dir), limit)


def _write_compact(
    specials: dict[str, int], start: list[int], texts: Iterable[str], tiktoken_path: Path, out_dir: Path, limit: int
) -> Tokenizer:
    """A compact tokenizer of the ids in `start` and of the texts' most frequent other tokens, up to `limit` ids, in `out_dir`."""
    bpe = _bpe(read_ranks(tiktoken_path))
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(bpe.encode_ordinary(text))
    new = counts.keys() - set(start)
    # Ties go to the lower rank, so that the same corpus in another order gives the same vocabulary.
    frequent = sorted(new, key=lambda token: (-counts[token], token))[: max(0, limit - len(start))]
    out_dir.mkdir(parents=True, exist_ok=True)
    if tiktoken_path.resolve() != (out_dir / "qwen.tiktoken").resolve():
        shutil.copyfile(tiktoken_path, out_dir / "qwen.tiktoken")
    qwen_ids = start + frequent
    tokenizer = Tokenizer(bpe, specials, qwen_ids, len(qwen_ids))
    tokenizer.save(out_dir, limit)
    return tokenizer


def compact_limit(directory: str | Path) -> int | None:
    """The `limit` that `build_compact` made a directory with; None when it did not make it, or did not finish."""
    try:
        return json.loads((Path(directory) / "compact.json").read_text(encoding="utf-8")).get("limit")
    except (OSError, ValueError, AttributeError):
        return None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read `qwen.tiktoken`: token bytes -> rank.

    Raises:
        TokenizerError: the file is missing, a line is damaged, or ranks or single bytes are missing.
    """
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file; `step-megatron data fetch` fetches Qwen's vocabulary, or set tokenizer.path")
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
            except ValueError as error:
                raise TokenizerError(f"{path}:{number}: not `base64 rank` ({error}); fetch the file again") from error
    if sorted(ranks.values()) != list(range(QWEN_RANKS)) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path}: {len(ranks)} ranks; Qwen's are {QWEN_RANKS}, 0 to {QWEN_RANKS - 1}: fetch the file again")
    return ranks


def _bpe(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})


def _read_added(path: Path) -> dict[str, int]:
    """The specials' ids of the whole vocabulary, `added_tokens.json` first."""
    specials = {**PUBLISHED_IDS, **PLACEHOLDER_IDS}
    if path.exists():
        try:
            added = json.loads(path.read_text(encoding="utf-8"))
            given = {str(name): int(number) for name, number in added.items()}
        except (json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
            raise TokenizerError(
                f'{path}: not an object {{"name": id}} ({error}); copy it from the model\'s directory'
            ) from error
        taken = {number: name for name, number in given.items()}
        specials = {**specials, **given}
        for name in PLACEHOLDER_IDS:
            if name not in given and specials[name] in taken:
                raise TokenizerError(
                    f"{path}: `{name}` is missing and its placeholder {specials[name]} is `{taken[specials[name]]}`: add it"
                )
    if len(set(specials.values())) != len(specials) or min(specials.values()) < QWEN_RANKS:
        raise TokenizerError(f"{path}: ids of special tokens must differ and be at least {QWEN_RANKS}; correct the file")
    return specials


def _read_compact(path: Path) -> tuple[dict[str, int], list[int]]:
    """Specials and Qwen ids of a compact vocabulary."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        specials, qwen_ids = record["specials"], record["qwen_ids"]
        sound = record["format"] == COMPACT_FORMAT and set(SPECIALS) <= specials.keys()
        sound = sound and len(set(qwen_ids)) == len(qwen_ids) and all(0 <= specials[name] < len(qwen_ids) for name in specials)
        special_ids = set(specials.values())
        sound = sound and all(0 <= qwen < QWEN_RANKS for number, qwen in enumerate(qwen_ids) if number not in special_ids)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{path}: not a compact vocabulary ({error!r}); build it again with `step-megatron data build`"
        ) from error
    if not sound:
        raise TokenizerError(
            f"{path}: ids are doubled, missing or of another format; build it again with `step-megatron data build`"
        )
    return specials, qwen_ids
