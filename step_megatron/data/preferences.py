"""Preference records: two replies to the same conversation, and which one is better. One JSON object a line of a JSONL file:

    {"id": "ast-17", "source": "asterisk", "meta": {"split": "train"},
     "history": [{"role": "human", "content": [{"type": "audio", "audio": "17.wav"}, {"type": "text", "text": "Language?"}]}],
     "response": "It is Italian.", "reference": "Italian", "reference_from": "data",
     "rubric": ["Names the language.", "Answers in a full sentence."],
     "verdict": {"rubric": [0, 3], "overall": 2},
     "reasoning": "Both are right; only {response} is a sentence."}

- `history` is turns as in a conversation (`schema`), audio included, up to the reply; addresses are relative to the file.
- `response` and `reference` are replies without reasoning; either may be empty. `reference_from` says where the reference is
  from: `data`, or `sft` (a sample of the frozen model that PPO starts from).
- `rubric` (criteria) is left out for plain preference.
- `verdict` is seen from the response: levels above zero mean that it is the better one. `rubric` there has a level for each
  criterion. Left out where nobody has judged yet, for labelling.
- `reasoning` is the judge's, and optional; without it a reward model's loss covers the verdict alone. It calls the replies
  `{response}` and `{reference}`, for either may be the first that the judge is shown; lines about one of them, that begin with
  `{response}:` or `{reference}:`, are put in the order of the replies.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_megatron.data.schema import Audio, Checker, SchemaError, Turn, kind_of, parse_json, turn_records, write_lines
from step_megatron.data.template import THINK_END

REFERENCE_FROM = ("data", "sft")
_REQUIRED = {"id", "source", "history", "response", "reference", "reference_from"}
_OPTIONAL = {"meta", "rubric", "verdict", "reasoning"}


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    rubric: a level for each criterion, in order.
    overall: above zero, the first reply is better.
    """

    rubric: tuple[int, ...]
    overall: int

    def swapped(self) -> "Verdict":
        """The same opinion with the replies in the other order."""
        return Verdict(tuple(-level for level in self.rubric), -self.overall)


@dataclass(frozen=True)
class Preference:
    """One record; see the module."""

    id: str
    source: str
    history: tuple[Turn, ...]
    response: str
    reference: str
    reference_from: str
    rubric: tuple[str, ...] = ()
    verdict: Verdict | None = None
    reasoning: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def read_preferences(path: str | Path) -> list[Preference]:
    """Read and validate a whole file; blank lines are skipped.

    Raises:
        SchemaError: no such file, an empty one, a line that is no record, or an id that occurs twice.
    """
    return read_records(path, parse_preference, "preference")


def write_preferences(path: str | Path, preferences: Iterable[Preference]) -> int:
    """Write a JSONL file atomically, each record validated as a reader would; returns their number.

    Raises:
        SchemaError: a record is not valid; nothing is written.
    """
    return write_lines(path, map(preference_record, preferences), parse_preference)


def preference_record(preference: Preference) -> dict[str, Any]:
    """The JSON object of one line."""
    record = {
        "id": preference.id,
        "source": preference.source,
        "meta": preference.meta,
        "history": turn_records(preference.history),
        "response": preference.response,
        "reference": preference.reference,
        "reference_from": preference.reference_from,
    }
    if preference.rubric:
        record["rubric"] = list(preference.rubric)
    if preference.verdict is not None:
        record["verdict"] = {"rubric": list(preference.verdict.rubric), "overall": preference.verdict.overall}
    if preference.reasoning is not None:
        record["reasoning"] = preference.reasoning
    return record


def parse_preference(line: str | bytes, where: str) -> Preference:
    """Parse one line; `where` ("file:line") opens every error message.

    Raises:
        SchemaError: names the place, the field, and what to write instead.
    """
    return _PreferenceChecker(where).preference(parse_json(line, where))


def read_records(path: str | Path, parse: Callable[[bytes, str], Any], kind: str) -> list[Any]:
    """The records of a JSONL file, in order; each has an `id` of its own. `kind` is what an error calls one.

    Raises:
        SchemaError: see `read_preferences`.
    """
    path = Path(path)
    if not path.is_file():
        raise SchemaError(f"{path}: no such file; give a JSONL file of {kind} records")
    records, places = [], {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                records.append(parse(line, f"{path}:{number}"))
                first = places.setdefault(records[-1].id, number)
                if first != number:
                    raise SchemaError(f"{path}:{number}: field `id` is {records[-1].id!r}, as in line {first}; make ids unique")
    if not records:
        raise SchemaError(f"{path}: the file holds no record; write one {kind} a line")
    return records


def moved(turns: Iterable[Turn], source: Path, target: Path) -> tuple[Turn, ...]:
    """The same turns, for a file in folder `target`: addresses that are relative to `source` still name the same clips."""
    prefix = os.path.relpath(source, target)
    if prefix == ".":
        return tuple(turns)

    def move(item):
        keep = not isinstance(item, Audio) or os.path.isabs(item.address)
        return item if keep else Audio(os.path.normpath(os.path.join(prefix, item.address)))

    return tuple(dataclasses.replace(turn, content=tuple(map(move, turn.content))) for turn in turns)


class RecordChecker(Checker):
    """What preference records and prompts of PPO have in common."""

    def reference_from(self, value: Any) -> str:
        if value not in REFERENCE_FROM:
            raise self.fail("reference_from", f"is {value!r}", f"write one of {', '.join(REFERENCE_FROM)}")
        return value

    def rubric(self, rubric: Any) -> tuple[str, ...]:
        if rubric is None:
            return ()
        if not isinstance(rubric, list) or not rubric:
            raise self.fail("rubric", f"is {kind_of(rubric)}", "write a list of criteria, or leave it out for plain preference")
        return tuple(self.string(criterion, f"rubric[{i}]") for i, criterion in enumerate(rubric))


class _PreferenceChecker(RecordChecker):
    def preference(self, record: Any) -> Preference:
        self.keys(record, "preference", _REQUIRED, _OPTIONAL)
        rubric = self.rubric(record.get("rubric"))
        return Preference(
            id=self.string(record["id"], "id"),
            source=self.string(record["source"], "source"),
            history=self.turns(record["history"], "history"),
            response=self.string(record["response"], "response", may_be_empty=True),
            reference=self.string(record["reference"], "reference", may_be_empty=True),
            reference_from=self.reference_from(record["reference_from"]),
            rubric=rubric,
            verdict=self.verdict(record.get("verdict"), len(rubric)),
            reasoning=self.reasoning(record.get("reasoning")),
            meta=self.meta(record.get("meta", {})),
        )

    def verdict(self, verdict: Any, criteria: int) -> Verdict | None:
        if verdict is None:
            return None
        self.keys(verdict, "verdict", {"overall"}, {"rubric"})
        levels = verdict.get("rubric", [])
        if not isinstance(levels, list) or len(levels) != criteria:
            raise self.fail("verdict.rubric", f"does not fit {criteria} criteria", "write a list with a level for each")
        rubric = tuple(self.level(level, f"verdict.rubric[{i}]") for i, level in enumerate(levels))
        return Verdict(rubric, self.level(verdict["overall"], "verdict.overall"))

    def level(self, level: Any, name: str) -> int:
        if type(level) is not int:
            raise self.fail(name, f"is {kind_of(level)}, {level!r}", "write a whole number, above zero for the response")
        return level

    def reasoning(self, reasoning: Any) -> str | None:
        if reasoning is None:
            return None
        self.string(reasoning, "reasoning")
        if THINK_END in reasoning:
            raise self.fail("reasoning", f"holds {THINK_END}", "leave the mark out: the template writes it")
        if re.search(r"\breply [12]\b", reasoning, re.IGNORECASE):
            raise self.fail("reasoning", "numbers the replies", "write {response} and {reference}: either may be shown first")
        return reasoning
