"""Lengths of segments that the cases use: those of real clips, and a narrow spread."""

import json
import random
from pathlib import Path

_ASTERISK = Path(__file__).with_name("asterisk_lengths.json")


def asterisk(segments: int = 64) -> list[int]:
    """Encoder frames (50 a second) of real prompts: most are a second or two long, some reach 22."""
    return json.loads(_ASTERISK.read_text())["lengths"][:segments]


def uniform(segments: int = 64, low: int = 50, high: int = 250) -> list[int]:
    """Lengths spread evenly from `low` to `high`."""
    draw = random.Random(0)
    return [draw.randint(low, high) for _ in range(segments)]


def named(lengths: list[int]) -> str:
    """How tables call a packed batch."""
    kind = "Asterisk" if lengths == asterisk(len(lengths)) else f"{min(lengths)}-{max(lengths)}"
    return f"{len(lengths)} x {kind} ({sum(lengths)})"
