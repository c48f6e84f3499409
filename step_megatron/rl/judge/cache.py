"""Answers already had, on disk, so that a run that is resumed or repeated asks nothing twice.

A folder of append-only JSONL files, one of each process that ever wrote: `{"key": sha256, "text": answer}` a line. Files are only
appended to, so processes and machines share the folder without locks; each reads what was there when it started. A last line
that was cut short by a crash is passed over.
"""

import hashlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)


class AnswerCache:
    """Answers by `key`; safe in several threads.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._answers: dict[str, str] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            self._read(path)
        self._own = self.folder / f"answers-{socket.gethostname()}-{os.getpid()}.jsonl"

    def get(self, key: str) -> str | None:
        with self._lock:
            return self._answers.get(key)

    def put(self, key: str, text: str) -> None:
        line = json.dumps({"key": key, "text": text}) + "\n"
        with self._lock:
            if key not in self._answers:
                self._answers[key] = text
                with self._own.open("a", encoding="utf-8") as file:
                    file.write(line)

    def _read(self, path: Path) -> None:
        damaged = 0
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                self._answers[record["key"]] = record["text"]
            except (json.JSONDecodeError, TypeError, KeyError):
                damaged += 1
        if damaged:
            logger.warning("%s: %d damaged lines are passed over; their answers are asked for again", path, damaged)


def key_of(question: Any) -> str:
    """SHA-256 of a JSON value: everything that the answer depends on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
