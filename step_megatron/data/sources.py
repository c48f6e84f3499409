"""The sources of a mixture on disk: validated once, clips looked up, then read sample by sample."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from step_megatron.config.schema import SourceConfig
from step_megatron.data.aspects import aspect_of
from step_megatron.data.schema import Audio, Conversation, ConversationFile, Text
from step_megatron.runtime.files import append_json_line
from step_megatron.runtime.progress import get_logger, rank

NOT_INDEXED = "clip not in the audio index"

_log = get_logger(__name__)


class DataError(ValueError):
    """The data cannot be trained on as configured; the message says what to change."""


class TrainingSources:
    """The usable samples of every source: of conversations that pass the filters and whose clips are all in the audio index.

    Args:
        sources: `data.sources`.
        index_path: `data.index`, a file or its folder. Addresses come out relative to the folder, or absolute.
        has_tokens: whether the index knows a clip and it gives tokens; None if there is no index.
        limit: share of the clips that may be missing, and of a source's samples that `leave_out` may be given
            (`data.quarantine_limit`).
        samples_of: the samples that a conversation is trained as (`turns.training_samples`).
        refused: why a filter drops a conversation, or None (`filters.first_reason`).
        quarantine: file that rank 0 writes every sample to that is left out, once however often the run is started.

    Attributes:
        left_out: conversations that are left out, here or by `leave_out`, some or all of their samples: (source, line of its file
            from 0) -> reason.
        clips: how many clips of the index the samples name.

    Raises:
        SchemaError: a file has a bad line.
        DataError: audio without an index, or more missing clips than `limit`.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        index_path: str,
        has_tokens: Callable[[str], bool] | None,
        limit: float,
        samples_of: Callable[[Conversation], list[Conversation]] = lambda conversation: [conversation],
        refused: Callable[[Conversation], str | None] = lambda conversation: None,
        quarantine: str | Path | None = None,
    ):
        self.left_out: dict[tuple[int, int], str] = {}
        self._samples_of, self._refused = samples_of, refused
        self._names, self._limit = [source.name for source in sources], limit
        self._quarantine = Path(quarantine) if quarantine and rank() == 0 else None
        self._written = _samples_in(self._quarantine)
        self._said: set[str] = set()
        self._index_dir = folder_of_index(index_path)
        self._files = [ConversationFile(source.path) for source in sources]
        known: dict[str, bool] = {}
        self._aspects: list[set[str]] = [set() for _ in sources]
        self._rows = [self._usable(source, file, has_tokens, known) for source, file in enumerate(self._files)]
        # Left out whatever is drawn; `leave_out` adds what a sample's rendering shows.
        self._unusable = dict(self.left_out)
        self.clips = sum(known.values())
        missing = [clip for clip, there in known.items() if not there]
        if len(missing) > limit * len(known):
            raise DataError(
                f"{len(missing)} of {len(known)} clips are not in the audio index, such as {missing[0]}; data.quarantine_limit "
                f"allows {limit:.1%}: run `step-megatron data validate`, repair what quarantine.jsonl names, or raise the limit"
            )

    def size(self, source: int) -> int:
        """Usable samples of a source."""
        return len(self._rows[source])

    def aspects(self, source: int) -> list[str]:
        """Aspects of a source's usable samples, sorted; "" stands for samples without one."""
        return sorted(self._aspects[source])

    def conversation(self, source: int, index: int) -> Conversation:
        """A usable sample, its addresses as the audio index knows them."""
        file, (row, number) = self._files[source], self._rows[source][index].tolist()
        return self._samples_of(located(file[row], file.path, self._index_dir))[number]

    def digests(self, source: int) -> dict[str, str]:
        """SHA-256 of a source's file and of which of its samples are usable."""
        with self._files[source].path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": content, "usable": hashlib.sha256(self._conversations(source).tobytes()).hexdigest()}

    def _conversations(self, source: int) -> np.ndarray:
        """Rows of a source's usable conversations, int64 `[n]`."""
        return np.unique(self._rows[source][:, 0])

    def leave_out(self, source: int, index: int, name: str, reason: str, remedy: str) -> None:
        """Leave out a usable sample that cannot be trained on; counted once, however many epochs meet it.

        Args:
            source, index: as `conversation` takes them.
            name: its id.
            reason: its part before a colon is what is counted.

        Raises:
            DataError: more than the limit allows of the source's samples are left out for what they are themselves.
        """
        if not self._note(source, int(self._rows[source][index][0]), name, reason, remedy):
            return
        count = sum(place[0] == source and place not in self._unusable for place in self.left_out)
        usable = len(self._conversations(source))
        if count > self._limit * usable:
            raise DataError(
                f"{count} of the {usable} samples of source {self._names[source]!r} cannot be trained on, more than "
                f"data.quarantine_limit={self._limit:g} allows; the last is {name!r}: {reason}: {remedy}, or raise the limit"
            )

    def state(self) -> list[list]:
        """What `leave_out` was given, as JSON values; the same on every rank."""
        return [[*place, reason] for place, reason in sorted(self.left_out.items()) if place not in self._unusable]

    def load_state(self, state: list[list]) -> None:
        """Forget what `leave_out` was given, and take over what another run of the same sources had found."""
        self.left_out = self._unusable | {(source, row): reason for source, row, reason in state}

    def _note(self, source: int, row: int, name: str, reason: str, remedy: str) -> bool:
        """Count a sample, write it down, and say so if it is the first of its kind; False if it was counted before."""
        kind = reason.partition(":")[0]
        if (source, row) in self.left_out:
            return False
        self.left_out[source, row] = kind
        if kind not in self._said and rank() == 0:
            _log.warning(
                "sample %s of source %s is left out: %s; %s (others with %r are only counted and written to quarantine.jsonl)",
                name, self._names[source], reason, remedy, kind,
            )  # fmt: skip
        self._said.add(kind)
        if self._quarantine is not None and (self._names[source], name) not in self._written:
            self._written.add((self._names[source], name))
            entry = {"id": name, "source": self._names[source], "reason": reason, "remedy": remedy}
            append_json_line(self._quarantine, entry)
        return True

    def _usable(
        self, source: int, file: ConversationFile, has_tokens: Callable[[str], bool] | None, known: dict[str, bool]
    ) -> np.ndarray:
        """Validate every line of a file; the usable samples `[n, 2]` as row and number within the conversation's samples.

        `known` collects whether each clip is in the index.
        """
        rows = []
        for row, conversation in enumerate(file):
            if found := self._refused(conversation):
                self._note(source, row, conversation.id, found, "change data.filters to keep it")
                continue
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
                remedy = "the quarantine.jsonl beside the index says why; else run `step-megatron data validate`"
                self._note(source, row, conversation.id, f"{NOT_INDEXED}: {missing[0]}", remedy)
            else:
                rows += [(row, number) for number in range(len(self._samples_of(conversation)))]
                self._aspects[source].add(aspect_of(conversation.meta))
        return np.array(rows, np.int64).reshape(-1, 2)


def _samples_in(path: Path | None) -> set[tuple[str, str]]:
    """(source, id) of the samples that a quarantine file names; it also names clips, and a kill may have torn its last line."""
    names = set()
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "id" in entry:
            names.add((entry["source"], entry["id"]))
    return names


def folder_of_index(path: str | Path | None) -> str | None:
    """The folder that an index's addresses start from; None without an index."""
    if not path:
        return None
    path = os.path.abspath(path)
    return path if os.path.isdir(path) else os.path.dirname(path)


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
