"""Conversations: the one form in which training and evaluation data exist, and the JSONL that holds them.

One line of a JSONL file is one conversation:

    {"id": "ast-en-hello-1", "source": "asterisk",
     "meta": {"task": "transcription", "answer": "hello", "split": "train", "language": "en"},
     "turns": [{"role": "system", "content": "You listen and answer."},
               {"role": "human", "content": [{"type": "audio", "audio": "audio/en/hello.wav"},
                                             {"type": "text", "text": "What is said?"}]},
               {"role": "assistant", "reasoning": "0.8 s of speech.", "content": "hello"}]}

- `id`, `source` (who the data is from) and `turns` are required; `meta` holds anything else. Of `meta`, `task` and `answer` are
  strings, `split` is train, validation or test, `aspect` and `aspect_kind` are those of `aspects`,
  and `checks` is as `checks` says.
- Roles: system, human, assistant, function_output, tool_json_schemas.
- `content` is a string or a list of items, `{"type": "text", "text": ...}` or `{"type": "audio", "audio": ADDRESS}`. An address
  is `clip.wav`, `shard.tar::member.wav` or `shard.bin@OFFSET+SIZE`, relative to the JSONL's directory.
- Assistant turns hold text only. They may have `reasoning` (a string), `"train": false` for a reply that is context only, and
  `"train": "content"` for one whose reasoning (or lack of it) is not to be learnt: the loss covers its content alone.
- An unknown key is an error, so that a misspelt one cannot be lost. Numbers must be JSON numbers: NaN is refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from step_megatron.data.aspects import ASPECTS
from step_megatron.data.checks import read_check

ROLES = ("system", "human", "assistant", "function_output", "tool_json_schemas")
SPLITS = ("train", "validation", "test")


class SchemaError(ValueError):
    """A line of a data file is not what it must be; the message names file, line, field and remedy."""


@dataclass(frozen=True)
class Text:
    """A piece of text. Strings that look like special tokens are text, never specials."""

    text: str


@dataclass(frozen=True)
class Audio:
    """A clip by its address, relative to the directory of the JSONL file."""

    address: str


@dataclass(frozen=True)
class Turn:
    """One turn; `reasoning` and `train` mean something for the assistant only."""

    role: str
    content: tuple[Text | Audio, ...]
    reasoning: str | None = None
    train: bool | Literal["content"] = True

    @property
    def text(self) -> str:
        """The turn's text items, joined; its audio is left out."""
        return "".join(item.text for item in self.content if isinstance(item, Text))


@dataclass(frozen=True)
class Conversation:
    """Turns with an identity; `source` says where the data is from, `meta` what is known about it."""

    id: str
    source: str
    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def audio_addresses(self) -> tuple[str, ...]:
        """Addresses of all clips in order, repeats included."""
        return tuple(item.address for turn in self.turns for item in turn.content if isinstance(item, Audio))


class ConversationFile:
    """Random access to the conversations of a JSONL file, of which only the lines' offsets are held in memory.

    Blank lines are skipped. `len(file)` conversations; `file[i]` reads and validates one; iteration goes through all of them.

    Raises:
        SchemaError: the file is missing or empty, or (on access) a line is not a conversation.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise SchemaError(
                f"{self.path}: no such file; a source's path names a JSONL file (`step-megatron data fetch` writes some)"
            )
        offsets, lines, offset = [], [], 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    offsets.append(offset)
                    lines.append(number)
                offset += len(line)
        if not offsets:
            raise SchemaError(f"{self.path}: the file holds no conversation; remove the source or write one conversation a line")
        self._offsets, self._lines = np.array(offsets, np.int64), np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Conversation:
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[index]))
            return parse_line(file.readline(), f"{self.path}:{self._lines[index]}")

    def __iter__(self) -> Iterator[Conversation]:
        return (conversation for _, conversation in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Conversation]]:
        """All conversations with the numbers of their lines, from 1."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_line(line, f"{self.path}:{number}")


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read and validate a whole JSONL file.

    Raises:
        SchemaError: see `ConversationFile`.
    """
    return list(ConversationFile(path))


def write_conversations(path: str | Path, conversations: Iterable[Conversation]) -> int:
    """Write a JSONL file atomically and return the number of lines; each conversation is validated as a reader would.

    Raises:
        SchemaError: a conversation is not valid; nothing is written.
    """
    return write_lines(path, map(to_record, conversations), parse_line)


def write_lines(path: str | Path, records: Iterable[dict[str, Any]], parse: Callable[[str, str], Any]) -> int:
    """Write JSON objects a line each, atomically, and return how many; `parse(line, where)` refuses what a reader would.

    Raises:
        SchemaError: from `parse`; nothing is written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for count, record in enumerate(records, 1):
                line = json.dumps(record, ensure_ascii=False)
                parse(line, f"{path}:{count}")
                file.write(line + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def to_record(conversation: Conversation) -> dict[str, Any]:
    """The JSON object of one line; text-only content becomes a plain string where that loses nothing."""
    turns = turn_records(conversation.turns)
    return {"id": conversation.id, "source": conversation.source, "meta": conversation.meta, "turns": turns}


def turn_records(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """The JSON list of turns."""
    records = []
    for turn in turns:
        record: dict[str, Any] = {"role": turn.role}
        if turn.reasoning is not None:
            record["reasoning"] = turn.reasoning
        if len(turn.content) == 1 and isinstance(turn.content[0], Text):
            record["content"] = turn.content[0].text
        else:
            record["content"] = [
                {"type": "text", "text": item.text} if isinstance(item, Text) else {"type": "audio", "audio": item.address}
                for item in turn.content
            ]
        if turn.train is not True:
            record["train"] = turn.train
        records.append(record)
    return records


def parse_line(line: str | bytes, where: str) -> Conversation:
    """Parse one line; `where` ("file:line") opens every error message.

    Raises:
        SchemaError: names the place, the field, and what to write instead.
    """
    return Checker(where).conversation(parse_json(line, where))


def parse_json(line: str | bytes, where: str) -> Any:
    """The JSON value of a line; NaN and infinities are refused.

    Raises:
        SchemaError: it is none.
    """

    def refuse_constant(name: str) -> None:
        raise SchemaError(f"{where}: {name} is not JSON; write a number or null")

    try:
        return json.loads(line, parse_constant=refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{where}: not a JSON object in UTF-8 ({error}); write one object a line") from error


class Checker:
    """Turns JSON values into the dataclasses; every refusal names place, field and remedy."""

    def __init__(self, where: str):
        self.where = where

    def fail(self, name: str, problem: str, remedy: str) -> SchemaError:
        return SchemaError(f"{self.where}: field `{name}` {problem}; {remedy}")

    def keys(self, record: Any, name: str, required: set[str], optional: set[str]) -> None:
        if not isinstance(record, dict):
            raise self.fail(
                name, f"is {kind_of(record)}", f"write an object with the keys {', '.join(sorted(required | optional))}"
            )
        if missing := required - record.keys():
            raise self.fail(f"{name}.{min(missing)}", "is missing", "add it")
        if unknown := record.keys() - required - optional:
            remedy = f"known keys are {', '.join(sorted(required | optional))}; other facts belong in the conversation's `meta`"
            raise self.fail(f"{name}.{min(unknown)}", "is not known", remedy)

    def string(self, value: Any, name: str, may_be_empty: bool = False) -> str:
        if not isinstance(value, str) or not (value or may_be_empty):
            raise self.fail(
                name, f"is {kind_of(value)}", "write a string" if may_be_empty else "write a string that is not empty"
            )
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.fail(name, "has half of a surrogate pair", "write the whole character") from None
        return value

    def conversation(self, record: Any) -> Conversation:
        self.keys(record, "conversation", {"id", "source", "turns"}, {"meta"})
        conversation = Conversation(
            id=self.string(record["id"], "id"),
            source=self.string(record["source"], "source"),
            turns=self.turns(record["turns"], "turns"),
            meta=self.meta(record.get("meta", {})),
        )
        self.checks(conversation)
        return conversation

    def checks(self, conversation: Conversation) -> None:
        """`meta.checks`, where there is one."""
        given, replies = conversation.meta.get("checks"), sum(turn.role == "assistant" for turn in conversation.turns)
        if given is None:
            return
        if not isinstance(given, list) or len(given) != replies:
            raise self.fail("meta.checks", "is not a list with an entry for each assistant turn", f"write {replies}, or nulls")
        for number, check in enumerate(given):
            try:
                read_check(check)
            except ValueError as error:
                raise self.fail(f"meta.checks[{number}]", *str(error).split("; ", 1)) from None

    def turns(self, turns: Any, name: str) -> tuple[Turn, ...]:
        if not isinstance(turns, list) or not turns:
            raise self.fail(name, f"is {kind_of(turns)}", "write a list of at least one turn")
        return tuple(self.turn(turn, f"{name}[{i}]") for i, turn in enumerate(turns))

    def meta(self, meta: Any) -> dict[str, Any]:
        if not isinstance(meta, dict):
            raise self.fail("meta", f"is {kind_of(meta)}", "write an object")
        for name in ("task", "answer"):
            if name in meta:
                self.string(meta[name], f"meta.{name}", may_be_empty=name == "answer")
        if "split" in meta and meta["split"] not in SPLITS:
            raise self.fail("meta.split", f"is {meta['split']!r}", f"write one of {', '.join(SPLITS)}")
        self.aspect(meta)
        return meta

    def aspect(self, meta: dict[str, Any]) -> None:
        aspect = meta.get("aspect")
        if "aspect" in meta and aspect not in tuple(ASPECTS):
            raise self.fail("meta.aspect", f"is {aspect!r}", f"write one of {', '.join(ASPECTS)}")
        if "aspect_kind" in meta and "aspect" not in meta:
            raise self.fail("meta.aspect_kind", "is set without meta.aspect", "add the aspect that it is a kind of")
        if "aspect_kind" in meta and meta["aspect_kind"] not in ASPECTS[aspect]:
            remedy = f"write one of {', '.join(ASPECTS[aspect])}" if ASPECTS[aspect] else f"{aspect} has no kinds: remove it"
            raise self.fail("meta.aspect_kind", f"is {meta['aspect_kind']!r}", remedy)

    def turn(self, turn: Any, name: str) -> Turn:
        self.keys(turn, name, {"role", "content"}, {"reasoning", "train"})
        role = turn["role"]
        if role not in ROLES:
            raise self.fail(f"{name}.role", f"is {role!r}", f"write one of {', '.join(ROLES)}")
        for key in ("reasoning", "train"):
            if key in turn and role != "assistant":
                raise self.fail(f"{name}.{key}", f"is set on a {role} turn", "only assistant turns have it: remove it")
        train = turn.get("train", True)
        if not (isinstance(train, bool) or train == "content"):
            raise self.fail(f"{name}.train", f"is {kind_of(train)}", 'write true, false or "content"')
        reasoning = turn.get("reasoning")
        if reasoning is not None:
            self.string(reasoning, f"{name}.reasoning", may_be_empty=True)
        return Turn(role, self.content(turn["content"], name, role), reasoning, train)

    def content(self, content: Any, turn: str, role: str) -> tuple[Text | Audio, ...]:
        name = f"{turn}.content"
        if isinstance(content, str):
            return (Text(self.string(content, name, may_be_empty=True)),)
        if not isinstance(content, list) or not content:
            raise self.fail(name, f"is {kind_of(content)}", "write a string or a list of at least one item")
        return tuple(self.item(item, f"{name}[{i}]", role) for i, item in enumerate(content))

    def item(self, item: Any, name: str, role: str) -> Text | Audio:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in ("text", "audio"):
            raise self.fail(
                f"{name}.type", f"is {kind!r}", 'write {"type": "text", "text": ...} or {"type": "audio", "audio": ...}'
            )
        self.keys(item, name, {"type", kind}, set())
        if kind == "text":
            return Text(self.string(item["text"], f"{name}.text", may_be_empty=True))
        if role == "assistant":
            raise self.fail(name, "is audio in an assistant turn", "the model writes text only: use another role or text")
        return Audio(self.string(item["audio"], f"{name}.audio"))


def kind_of(value: Any) -> str:
    """A JSON value's kind, for messages."""
    if value is None:
        return "null"
    if isinstance(value, (str, list, dict)) and not value:
        return f"an empty {({str: 'string', list: 'list', dict: 'object'})[type(value)]}"
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
