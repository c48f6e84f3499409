"""Check a built data set: nothing that is tested was trained on."""

import hashlib
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

from step_megatron.data.recipes.clip import normalise
from step_megatron.data.schema import SPLITS, Conversation, read_conversations


class SplitError(ValueError):
    """Two splits share something that they must not share."""


def check_splits(directory: str | Path) -> None:
    """Check that no two splits of the data set in `directory` share a text, a group, a clip's bytes, a question or a test
    template.

    Groups are syllables (tone), voices (gender) and recordings (sound events). Held-out items must be a single question.

    Raises:
        SplitError: naming the splits, the kind and an example.
        SchemaError: a file is missing or broken.
    """
    directory = Path(directory)
    spoken = {split: read_conversations(directory / f"{split}.jsonl") for split in SPLITS}
    written = {split: read_conversations(directory / f"text_{split}.jsonl") for split in SPLITS}
    for kind, of in (("transcript", _texts), ("group", _groups)):
        disjoint(kind, {split: of(spoken[split]) for split in SPLITS})
    disjoint("clip", {split: _contents(spoken[split], directory) for split in SPLITS})
    disjoint("question", {split: {c.turns[0].text for c in written[split]} for split in SPLITS})
    templates = {split: {c.meta["template"] for c in written[split]} for split in SPLITS}
    disjoint("template", {"train": templates["train"] | templates["validation"], "test": templates["test"]})
    for split in ("validation", "test"):
        for conversation in spoken[split] + written[split]:
            if len(conversation.turns) != 2:
                raise SplitError(f"{split}: {conversation.id} has {len(conversation.turns)} turns; an item is one question")


def disjoint(kind: str, sets: dict[str, set[str]]) -> None:
    """Check that no two splits share anything.

    Args:
        kind: what is looked at, for the message.
        sets: split -> its members.

    Raises:
        SplitError: names the splits and an example.
    """
    for first, second in combinations(sets, 2):
        if shared := sets[first] & sets[second]:
            raise SplitError(f"{first} and {second} share {len(shared)} {kind}s, such as {min(shared)!r}")


def _texts(conversations: Iterable[Conversation]) -> set[str]:
    return {normalise(c.meta["text"]) for c in conversations if normalise(c.meta["text"])}


def _groups(conversations: Iterable[Conversation]) -> set[str]:
    return {c.meta["group"] for c in conversations}


def _contents(conversations: Iterable[Conversation], directory: Path) -> set[str]:
    addresses = {address for c in conversations for address in c.audio_addresses()}
    return {hashlib.sha256((directory / address).read_bytes()).hexdigest() for address in addresses}
