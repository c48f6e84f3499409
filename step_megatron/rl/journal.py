"""What an iteration has generated and judged so far, on disk, so that a killed run generates and judges nothing twice.

    RUN/iterations/000012/rollouts-3.jsonl       {"key": "5-0", "value": {...}}, a line as each sample ends, by rank 3
    RUN/iterations/000012/judgments-0.jsonl      the same for the answers of a judge

An iteration's files are read when it is begun again; what they hold was made from the same weights and seeds. A line that a kill
has torn counts for nothing.
"""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Journal:
    """A map from keys to JSON values that only grows; every rank of `group` makes it, and all know the same values.

    Args:
        folder: of the iteration.
        name: of the files.
        group: a gloo group of all ranks.
        writes: whether this rank writes; of the ranks that make the same values one should.
    """

    def __init__(self, folder: Path, name: str, group: dist.ProcessGroup, writes: bool):
        rank = dist.get_rank(group)
        self._path = folder / f"{name}-{rank}.jsonl" if writes else None
        known = [_read(folder, name) if rank == 0 else None]
        dist.broadcast_object_list(known, group_src=0, group=group)
        self.known: dict[str, Any] = known[0]
        self._file = None

    def write(self, key: str, value: Any) -> None:
        """Record a value; a kill after this does not lose it."""
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            if self._file.tell():
                # The last line may be torn: it must not swallow the next.
                self._file.write(b"\n")
        self._file.write(json.dumps({"key": key, "value": value}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read(folder: Path, name: str) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for path in sorted(folder.glob(f"{name}-*.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            known.setdefault(entry["key"], entry["value"])
    return known
