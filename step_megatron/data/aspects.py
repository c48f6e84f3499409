"""Aspects: what a conversation exercises beside its task, as data is tagged with it and as losses and quality are reported by it.

Cold-start SFT emphasises four aspects of interaction (section 3.2 of the Step-Audio-R1.5 report). A conversation says which by
`meta.aspect`, and may say more narrowly by `meta.aspect_kind`:

    continuity             context (what was said or heard before), constraint (a wish that holds over turns)
    instruction_following  content, format, style
    naturalness
    interaction_awareness  follow_up, clarification, interruption, revision
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASPECTS: dict[str, tuple[str, ...]] = {
    "continuity": ("context", "constraint"),
    "instruction_following": ("content", "format", "style"),
    "naturalness": (),
    "interaction_awareness": ("follow_up", "clarification", "interruption", "revision"),
}


def aspect_of(meta: Mapping[str, Any]) -> str:
    """`continuity`, `interaction_awareness.revision`, or "" for a conversation without the tag."""
    return ".".join(meta[name] for name in ("aspect", "aspect_kind") if name in meta)


@dataclass(frozen=True)
class LossGroup:
    """What the losses of a sample are summed with: samples of one source of the mixture and of one aspect.

    Attributes:
        source: the mixture's name of the source.
        aspect: as `aspect_of` returns.
    """

    source: str
    aspect: str = ""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the means that the group's losses are part of, beside that of all losses."""
        aspect, _, kind = self.aspect.partition(".")
        by_aspect = [f"aspect_loss/{name}" for name in ((aspect, self.aspect) if kind else (aspect,)) if name]
        return (f"loss/{self.source}", *by_aspect)

    def __str__(self) -> str:
        return f"{self.source}|{self.aspect}" if self.aspect else self.source
