"""Scores of replies: label accuracy with its interval, character and word error rates.

- `split_reply`: reasoning and answer of what the model wrote after `<think>`;
- `score_labels`: accuracy over a closed label set, or over open answers;
- `score_transcripts`: character and word error rate, summed edits over summed reference length;
- `edit_distance`, `wilson_interval`, `normalise_label`, `normalise_transcript`: the parts.

A reply that cannot be read (no `</think>`, empty, or not in the label set) is wrong, and counted as `unparsable`. An item that
has no reply at all (its clip could not be read) is `failed`: it is in `attempted` and in no rate.
"""

import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from step_megatron.data.template import THINK_END, THINK_START

# End-of-turn and similar marks that a decoder may leave in the text: `<|EOT|>`, `<|endoftext|>`.
SPECIAL_MARK = re.compile(r"<\|[^|<>]*\|>")


@dataclass(frozen=True)
class Reply:
    """What the model wrote, taken apart; `answer` is None when the reasoning never ended or nothing followed it."""

    reasoning: str
    answer: str | None


def split_reply(text: str) -> Reply:
    """Take a generated text (it starts inside `<think>`, with or without the mark itself) apart at the first `</think>`."""
    reasoning, end, answer = SPECIAL_MARK.sub("", text).partition(THINK_END)
    reasoning = reasoning.replace(THINK_START, "", 1).strip()
    answer = answer.strip()
    return Reply(reasoning, answer if end and answer else None)


def normalise_label(text: str) -> str:
    """Label as compared: NFKC, case-folded, spaces collapsed, punctuation stripped from both ends (`Italian.` is `italian`)."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    start, end = 0, len(text)
    while start < end and unicodedata.category(text[start])[0] in "PZ":
        start += 1
    while end > start and unicodedata.category(text[end - 1])[0] in "PZ":
        end -= 1
    # `-5` and `5` are different answers: a sign before a digit stays.
    if start and start < end and text[start].isdigit() and text[start - 1] in "-−":
        start -= 1
    return text[start:end]


def normalise_transcript(text: str) -> str:
    """Transcript as compared: NFKC, case-folded, punctuation and symbols to spaces (apostrophes dropped), spaces collapsed.

    Accents stay: `perché` and `perche` differ by one character.
    """
    text = re.sub(r"['’ʼ`]", "", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PSCZ" else c for c in text).split())


def edit_distance(first: Sequence, second: Sequence) -> int:
    """Levenshtein distance (insert, delete, substitute: 1 each) of two sequences of hashable symbols, in O(len * len) numpy
    steps.

    Row recurrence `row[j] = min(candidate[j], row[j - 1] + 1)` is a running minimum of `candidate[j] - j`, so a row is three
    vector operations.
    """
    ids: dict = {}
    a = [ids.setdefault(symbol, len(ids)) for symbol in first]
    b = np.array([ids.setdefault(symbol, len(ids)) for symbol in second], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, symbol in enumerate(a, start=1):
        candidate = np.empty_like(row)
        candidate[0] = i
        candidate[1:] = np.minimum(row[1:] + 1, row[:-1] + (b != symbol))
        row = np.minimum.accumulate(candidate - steps) + steps
    return int(row[-1])


def wilson_interval(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95% by default; (0, 1) when nothing was counted.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """
    if n == 0:
        return 0.0, 1.0
    if not 0 <= correct <= n:
        raise ValueError(f"correct must lie between 0 and n, got {correct} of {n}")
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the exact ends are 0 and 1; rounding would miss them by an ulp.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def parse_label(reply: str, labels: Collection[str] | None) -> str | None:
    """Normalised answer of a reply, or None when it has none or when it is not one of `labels` (already normalised)."""
    answer = split_reply(reply).answer
    parsed = normalise_label(answer) if answer is not None else ""
    if not parsed or (labels is not None and parsed not in labels):
        return None
    return parsed


@dataclass(frozen=True)
class LabelScore:
    """Counts of one task; `accuracy` is over scored items, an unparsable reply being wrong."""

    attempted: int
    failed: int
    correct: int
    unparsable: int

    @property
    def scored(self) -> int:
        return self.attempted - self.failed

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.scored if self.scored else None

    @property
    def interval(self) -> list[float]:
        return list(wilson_interval(self.correct, self.scored))


def score_labels(answers: Sequence[str], replies: Sequence[str | None], labels: Collection[str] | None) -> LabelScore:
    """Score replies against the true answers.

    Args:
        answers: the right answer of each item, as written in the data.
        replies: generated text of each item (from inside `<think>` on), None where the item failed.
        labels: the closed set of answers of the task, or None for open answers (arithmetic).
    """
    allowed = None if labels is None else {normalise_label(label) for label in labels}
    failed = correct = unparsable = 0
    for answer, reply in zip(answers, replies, strict=True):
        if reply is None:
            failed += 1
            continue
        parsed = parse_label(reply, allowed)
        unparsable += parsed is None
        correct += parsed == normalise_label(answer)
    return LabelScore(len(answers), failed, correct, unparsable)


def score_transcripts(references: Sequence[str], replies: Sequence[str | None]) -> dict[str, float | int | None]:
    """Character and word error rates of replies, normalised by `normalise_transcript`.

    Rates are summed edits over summed reference length, so long clips weigh more and a rate can exceed 1. Characters include
    the single spaces between words; words are what spaces separate. An unparsable reply counts as an empty transcript.
    References that are empty after normalisation only add the insertions made for them.

    Returns:
        `cer`, `wer` (None when no reference had a character), `n` (= scored), `attempted`, `scored`, `failed`, `unparsable`.
    """
    edits, length = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    failed = unparsable = 0
    for reference, reply in zip(references, replies, strict=True):
        if reply is None:
            failed += 1
            continue
        answer = split_reply(reply).answer
        unparsable += answer is None
        truth, guess = normalise_transcript(reference), normalise_transcript(answer or "")
        edits += edit_distance(truth, guess), edit_distance(truth.split(), guess.split())
        length += len(truth), len(truth.split())
    scored = len(references) - failed
    cer, wer = (float(e / n) if n else None for e, n in zip(edits, length, strict=True))
    return {
        "cer": cer,
        "wer": wer,
        "n": scored,
        "attempted": len(references),
        "scored": scored,
        "failed": failed,
        "unparsable": unparsable,
    }
