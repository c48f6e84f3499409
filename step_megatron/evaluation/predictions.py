"""Answered items, as `predictions.jsonl` holds them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Prediction:
    """One answered item, a line of `predictions.jsonl`.

    Attributes:
        reply: generated text from inside `<think>` on; None if the item failed (its clip could not be read).
        other_clip: addresses heard in the control, None where there is no control.
        other_clip_reply: reply to the same question about those clips; None if not asked or failed.
        probe: the linear probe's answer, None where there is no probe.
        language: what is spoken, two letters; None where the data does not say.
        aspect, check: of a dialogue, as `tasks.Item` has them.
    """

    id: str
    task: str
    kind: str
    question: str
    answer: str
    reference_reasoning: str | None
    audio: tuple[str, ...]
    reply: str | None
    other_clip: tuple[str, ...] | None = None
    other_clip_reply: str | None = None
    probe: str | None = None
    language: str | None = None
    aspect: str = ""
    check: dict | None = None

    def row(self) -> dict:
        return asdict(self)


def read_predictions(rows: Sequence[dict]) -> list[Prediction]:
    """Predictions from the lines of `predictions.jsonl`."""
    predictions = [Prediction(**row) for row in rows]
    return [
        replace(p, audio=tuple(p.audio), other_clip=None if p.other_clip is None else tuple(p.other_clip)) for p in predictions
    ]
