"""From fetched archives to a data set ready to train on: conversations, compact vocabulary, audio index.

prepare(data_dir, out_dir)  ->  out_dir/{train,validation,test}.jsonl, text_*.jsonl, audio/   (recipes.build)
                                out_dir/tokenizer/                                            (Qwen tokens that occur)
                                out_dir/index.jsonl, quarantine.jsonl                         (every clip decoded once)
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

from step_megatron.audio.index import ValidationReport, validate
from step_megatron.data.recipes.build import build
from step_megatron.data.recipes.transcripts import build_transcripts
from step_megatron.data.schema import Conversation, read_conversations
from step_megatron.data.template import encoded_texts
from step_megatron.data.tokenizer import build_compact, compact_limit
from step_megatron.runtime.folders import finish_partial, start_partial

_TRAINED = ("train.jsonl", "text_train.jsonl")


def prepare(
    data_dir: Path,
    out_dir: Path,
    max_audio_seconds: float,
    vocabulary: int,
    seed: int,
    clips: int | None = None,
    more: Callable[[Path], Iterable[Conversation]] = lambda out_dir: (),
) -> dict:
    """Build the open-speech data set, its vocabulary and its index; what is already there and unchanged is kept.

    Args:
        data_dir: what `fetch` filled.
        out_dir: the data set's folder.
        max_audio_seconds: audio of all splits together.
        vocabulary: most token ids; another number than last time makes the vocabulary anew. Only the train split decides which:
            another split's rare words are spelled in bytes.
        seed, clips: see `recipes.build`.
        more: called with `out_dir` once the conversations are there: makes what later stages train on beside them, and returns
            those conversations, whose text the vocabulary has to hold as well.

    Returns:
        The summary of `recipes.build`.

    Raises:
        FileNotFoundError: nothing was fetched, or the Qwen vocabulary was not.
        QuarantineLimitExceeded: too many clips cannot be used.
    """
    qwen = data_dir / "qwen" / "qwen.tiktoken"
    if not qwen.is_file():
        raise FileNotFoundError(f"{qwen} is missing; run `step-megatron data fetch` first")
    summary = build(data_dir, out_dir, max_audio_seconds, seed, clips)
    later = more(out_dir)
    tokenizer = out_dir / "tokenizer"
    if compact_limit(tokenizer) != vocabulary:
        print(f"build: making a vocabulary of at most {vocabulary} ids", file=sys.stderr)
        trained = [conversation for name in _TRAINED for conversation in read_conversations(out_dir / name)]
        texts = (text for conversation in chain(trained, later) for text in encoded_texts(conversation))
        # Half a folder would be read as the whole Qwen vocabulary.
        build_compact(texts, qwen, start_partial(tokenizer), vocabulary)
        finish_partial(tokenizer)
    validate_conversations(sorted(out_dir.glob("*.jsonl")), out_dir)
    return summary


def prepare_transcripts(data_dir: Path, out_dir: Path, languages: Sequence[str], seed: int) -> dict:
    """The data set of `recipes.transcripts` and its index, for a model that has a tokenizer of its own.

    Returns:
        The summary of `build_transcripts`.

    Raises:
        FileNotFoundError: a language was not fetched.
        QuarantineLimitExceeded: too many clips cannot be used.
    """
    summary = build_transcripts(data_dir, out_dir, languages, seed=seed)
    validate_conversations(sorted(out_dir.glob("*.jsonl")), out_dir)
    return summary


def validate_conversations(
    paths: Iterable[Path], out_dir: Path, quarantine_limit: float = 0.01, max_seconds: float = 600.0
) -> ValidationReport:
    """Index every clip that conversation files name; see `audio.index.validate`.

    Args:
        paths: conversation files; `index.jsonl` and `quarantine.jsonl` among them are passed over.
        out_dir: folder of the index.
    """
    addresses: dict[str, None] = {}
    for path in paths:
        if path.name in ("index.jsonl", "quarantine.jsonl"):
            continue
        for conversation in read_conversations(path):
            addresses.update(dict.fromkeys(str(path.parent / address) for address in conversation.audio_addresses()))
    return validate(addresses, out_dir, quarantine_limit=quarantine_limit, max_seconds=max_seconds)
