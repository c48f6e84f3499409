"""What data files hold: counts, durations and tokens by source, task and split; and what is in two splits at once."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from step_megatron.audio.geometry import SAMPLE_RATE, AdaptorKind, clip_tokens
from step_megatron.data.schema import SPLITS, Conversation, ConversationFile
from step_megatron.data.sources import located
from step_megatron.data.template import render
from step_megatron.data.tokenizer import Tokenizer

COUNTS = ("conversations", "turns", "clips", "audio_seconds", "tokens", "trained_tokens", "not_indexed")


def inspect_files(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer | None = None,
    index: Mapping[str, Any] | None = None,
    index_dir: str | Path | None = None,
    template: str = "step-audio",
    adaptor: AdaptorKind = "step",
) -> dict[str, Any]:
    """Read, validate and count.

    A conversation's split is `meta.split`, else the file's name if that is a split (`train.jsonl`).

    Args:
        tokenizer: without one, tokens are not counted.
        index: the audio index; without one, durations and the tokens of conversations with audio are not counted. Conversations
            with a clip that it lacks are counted in `not_indexed` instead.
        index_dir: folder of the index; None if the files lie in it.

    Returns:
        JSON values. `rows`: the counts of every (source, task, split), with the keys `COUNTS`. `total`: their sums. `duplicates`:
        `ids` that occur twice, and what occurs in several splits: `clips` (by content where indexed), `transcripts`
        (`meta.text`, or the answer of a transcription) and, of conversations without audio, `questions`, each with its splits.

    Raises:
        SchemaError: a file has a bad line.
    """
    rows: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    duplicates = _Duplicates(index)

    def chunks(address: str) -> list[int]:
        return clip_tokens(index[address].num_samples, adaptor)

    for path in paths:
        for conversation in ConversationFile(path):
            conversation = located(conversation, path, index_dir)
            split = conversation.meta.get("split") or (Path(path).stem if Path(path).stem in SPLITS else "")
            row = rows[conversation.source, conversation.meta.get("task", ""), split]
            _count(row, conversation, tokenizer, index, chunks, template)
            duplicates.add(conversation, split)
    listed = [
        {"source": source, "task": task, "split": split, **counts}
        for (source, task, split), counts in sorted(rows.items(), key=_order)
    ]
    total = {name: sum(row[name] for row in listed) for name in COUNTS}
    return {"rows": listed, "total": total, "duplicates": duplicates.report()}


def table(report: dict[str, Any]) -> str:
    """The report as text: a line for each (source, task, split), the total, and what is in two splits."""
    head = ["source", "task", "split", *(name.replace("_", " ") for name in COUNTS)]
    lines = [head]
    for row in [*report["rows"], {"source": "total", "task": "", "split": "", **report["total"]}]:
        lines.append([row["source"], row["task"] or "-", row["split"] or "-", *(f"{row[name]:,.0f}" for name in COUNTS)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        text.append("  ".join(names + numbers))
    text.insert(1, "-" * len(text[0]))
    for name, found in report["duplicates"].items():
        what = "used twice" if name == "ids" else "in several splits"
        text.append(f"{name} {what}: {len(found)}" + (f", such as {found[0]}" if found else ""))
    return "\n".join(text)


def _order(item: tuple[tuple[str, str, str], Any]) -> tuple:
    source, task, split = item[0]
    return source, task, SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _count(
    row: dict[str, float],
    conversation: Conversation,
    tokenizer: Tokenizer | None,
    index: Mapping[str, Any] | None,
    chunks: Callable[[str], list[int]],
    template: str,
) -> None:
    """Add one conversation to its row."""
    clips = conversation.audio_addresses()
    row["conversations"] += 1
    row["turns"] += len(conversation.turns)
    row["clips"] += len(clips)
    if clips and index is None:
        return
    if any(clip not in index for clip in clips):
        row["not_indexed"] += 1
        return
    row["audio_seconds"] += sum(index[clip].num_samples for clip in clips) / SAMPLE_RATE
    if tokenizer is not None:
        sample = render(conversation, tokenizer, chunks, template)
        row["tokens"] += len(sample.input_ids)
        row["trained_tokens"] += sample.trained_tokens


class _Duplicates:
    """Collects what must be in one split only."""

    def __init__(self, index: Mapping[str, Any] | None):
        self.index = index
        self.ids: dict[str, int] = defaultdict(int)
        self.splits: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in ("clips", "transcripts", "questions")}

    def add(self, conversation: Conversation, split: str) -> None:
        self.ids[conversation.id] += 1
        clips = conversation.audio_addresses()
        for clip in clips:
            known = self.index is not None and clip in self.index
            self.splits["clips"][getattr(self.index[clip], "sha256", clip) if known else clip].add(split)
        transcript = conversation.meta.get("text")
        if transcript is None and conversation.meta.get("task") == "transcription":
            transcript = conversation.meta.get("answer")
        if clips and isinstance(transcript, str) and _normalised(transcript):
            self.splits["transcripts"][_normalised(transcript)].add(split)
        if not clips:
            asked = " ".join(turn.text for turn in conversation.turns if turn.role == "human")
            # Signs stay: 12 + 2 is not 12 - 2.
            self.splits["questions"][" ".join(asked.casefold().split())].add(split)

    def report(self) -> dict[str, list[str]]:
        found = {"ids": sorted(name for name, count in self.ids.items() if count > 1)}
        for name, seen in self.splits.items():
            found[name] = sorted(f"{key} ({', '.join(sorted(splits))})" for key, splits in seen.items() if len(splits) > 1)
        return found


def _normalised(text: str) -> str:
    """Lower case, one space between words, no punctuation: two texts that sound the same."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text).split())
