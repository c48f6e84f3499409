"""The sources of a mixture on disk: validated once, clips looked up, then read sample by sample."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from step_megatron.config.schema import SourceConfig
from step_megatron.data.schema import Audio, Conversation, ConversationFile, Text

NOT_INDEXED = "clip not in the audio index"


class DataError(ValueError):
    """The data cannot be trained on as configured; the message says what to change."""


class TrainingSources:
    """The usable samples of every source: those whose clips are all in the audio index.

    Args:
        sources: `data.sources`.
        index_path: `data.index`, a file or its folder. Addresses come out relative to the folder, or absolute.
        has_tokens: whether the index knows a clip and it gives tokens; None if there is no index.
        limit: share of the clips that may be missing (`data.quarantine_limit`).

    Attributes:
        quarantined: id -> reason and remedy of every sample that was left out, here or by `leave_out`.
        dropped: how many, by reason.

    Raises:
        SchemaError: a file has a bad line.
        DataError: audio without an index, or more missing clips than `limit`.
    """

    def __init__(self, sources: Sequence[SourceConfig], index_path: str, has_tokens: Callable[[str], bool] | None, limit: float):
        self.quarantined: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()
        self._index_dir = None
        if index_path:
            path = os.path.abspath(index_path)
            self._index_dir = path if os.path.isdir(path) else os.path.dirname(path)
        self._files = [ConversationFile(source.path) for source in sources]
        known: dict[str, bool] = {}
        self._rows = [self._usable(file, has_tokens, known) for file in self._files]
        missing = [clip for clip, there in known.items() if not there]
        if len(missing) > limit * len(known):
            raise DataError(
                f"{len(missing)} of {len(known)} clips are not in the audio index, such as {missing[0]}; data.quarantine_limit "
                f"allows {limit:.1%}: run `step-megatron data validate`, repair what quarantine.jsonl names, or raise the limit"
            )

    def size(self, source: int) -> int:
        """Usable samples of a source."""
        return len(self._rows[source])

    def conversation(self, source: int, index: int) -> Conversation:
        """A usable sample, its addresses as the audio index knows them."""
        file = self._files[source]
        return located(file[int(self._rows[source][index])], file.path, self._index_dir)

    def leave_out(self, name: str, reason: str, remedy: str) -> None:
        """Count a sample that cannot be trained on; once, however many epochs meet it."""
        if name not in self.quarantined:
            self.quarantined[name] = f"{reason}; {remedy}"
            self.dropped[reason.partition(":")[0]] += 1

    def _usable(self, file: ConversationFile, has_tokens: Callable[[str], bool] | None, known: dict[str, bool]) -> np.ndarray:
        """Validate every line of a file; the rows whose clips are all known. `known` collects the answers for each clip."""
        rows = []
        for row, conversation in enumerate(file):
            clips = located(conversation, file.path, self._index_dir).audio_addresses()
            if clips and has_tokens is None:
                raise DataError(
                    f"{file.path}: {conversation.id!r} has audio, but there is no audio index; "
                    "run `step-megatron data validate` and set data.index"
                )
            for clip in clips:
                if clip not in known:
                    known[clip] = has_tokens(clip)
            missing = [clip for clip in clips if not known[clip]]
            if missing:
                self.leave_out(conversation.id, f"{NOT_INDEXED}: {missing[0]}", "quarantine.jsonl says why")
            else:
                rows.append(row)
        return np.array(rows, np.int64)


def located(conversation: Conversation, path: str | Path, index_dir: str | Path | None) -> Conversation:
    """A conversation of the file `path` with its addresses as the index in `index_dir` knows them.

    They stay relative where the file lies in the index's folder (None: it does), and are absolute where it lies in another one.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if index_dir is None or folder == os.path.abspath(index_dir):
        return conversation

    def moved(item: Text | Audio) -> Text | Audio:
        return Audio(os.path.join(folder, item.address)) if isinstance(item, Audio) else item

    turns = tuple(replace(turn, content=tuple(map(moved, turn.content))) for turn in conversation.turns)
    return replace(conversation, turns=turns)
