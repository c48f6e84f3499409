"""What data files hold: counts, durations and tokens by source, task, split and aspect; and what is in two splits at once."""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from step_megatron.audio.geometry import SAMPLE_RATE, AdaptorKind, clip_tokens
from step_megatron.data.aspects import aspect_of
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
        JSON values. `rows`: the counts of every (source, task, split), with the keys `COUNTS`. `total`: their sums. `aspects`:
        the counts of every aspect, and of every kind of it (`aspects.aspect_of`), all splits together. `duplicates`:
        `ids` that occur twice, and what occurs in several splits: `clips` (by content where indexed), `transcripts`
        (`meta.text` or `meta.texts`, or the answer of a transcription) and, of conversations without audio, `questions`, each
        with its splits.

    Raises:
        SchemaError: a file has a bad line.
    """
    rows: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    aspects: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    duplicates = _Duplicates(index)

    def chunks(address: str) -> list[int]:
        return clip_tokens(index[address].num_samples, adaptor)

    for path in paths:
        for conversation in ConversationFile(path):
            conversation = located(conversation, path, index_dir)
            split = conversation.meta.get("split") or (Path(path).stem if Path(path).stem in SPLITS else "")
            aspect = aspect_of(conversation.meta)
            counts = _counts(conversation, tokenizer, index, chunks, template)
            for row in (
                rows[conversation.source, conversation.meta.get("task", ""), split],
                *(aspects[name] for name in dict.fromkeys((aspect.partition(".")[0], aspect)) if name),
            ):
                for name, count in counts.items():
                    row[name] += count
            duplicates.add(conversation, split)
    listed = [
        {"source": source, "task": task, "split": split, **counts}
        for (source, task, split), counts in sorted(rows.items(), key=_order)
    ]
    total = {name: sum(row[name] for row in listed) for name in COUNTS}
    return {"rows": listed, "total": total, "aspects": dict(sorted(aspects.items())), "duplicates": duplicates.report()}


def table(report: dict[str, Any]) -> str:
    """The report as text: a line for each (source, task, split), the total, the aspects, and what is in two splits."""
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
    for name, counts in report["aspects"].items():
        turns = counts["turns"] / counts["conversations"]
        text.append(
            f"{'  ' * name.count('.')}aspect {name}: {counts['conversations']:,} conversations of {turns:.1f} turns, "
            f"{counts['trained_tokens']:,} trained tokens"
        )
    for name, found in report["duplicates"].items():
        what = "used twice" if name == "ids" else "in several splits"
        text.append(f"{name} {what}: {len(found)}" + (f", such as {found[0]}" if found else ""))
    return "\n".join(text)


def _order(item: tuple[tuple[str, str, str], Any]) -> tuple:
    source, task, split = item[0]
    return source, task, SPLITS.index(split) if split in SPLITS else len(SPLITS), split


def _counts(
    conversation: Conversation,
    tokenizer: Tokenizer | None,
    index: Mapping[str, Any] | None,
    chunks: Callable[[str], list[int]],
    template: str,
) -> dict[str, float]:
    """What one conversation adds to the counts."""
    clips = conversation.audio_addresses()
    counts: dict[str, float] = {"conversations": 1, "turns": len(conversation.turns), "clips": len(clips)}
    if clips and index is None:
        return counts
    if any(clip not in index for clip in clips):
        return {**counts, "not_indexed": 1}
    counts["audio_seconds"] = sum(index[clip].num_samples for clip in clips) / SAMPLE_RATE
    if tokenizer is not None:
        sample = render(conversation, tokenizer, chunks, template)
        counts |= {"tokens": len(sample.input_ids), "trained_tokens": sample.trained_tokens}
    return counts


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
        for transcript in _transcripts(conversation.meta) if clips else ():
            if isinstance(transcript, str) and _normalised(transcript):
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


def _transcripts(meta: Mapping[str, Any]) -> list[Any]:
    """What is said in a conversation's clips, as far as `meta` tells."""
    if "text" in meta or "texts" in meta:
        texts = meta.get("texts", [])
        return [meta.get("text"), *(texts if isinstance(texts, list) else [])]
    return [meta.get("answer")] if meta.get("task") == "transcription" else []


def _normalised(text: str) -> str:
    """Lower case, one space between words, no punctuation: two texts that sound the same."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text).split())
