"""Filters: conversations that would teach what nobody wants, found by rules, each with a reason.

    api_error         a reply or its reasoning is what a teacher's API answered when it failed (Step-Audio-R1 leaks such JSON)
    empty_reasoning   a trained reply has reasoning without a word in it
    near_empty_reply  a trained reply has no word, number or sign but punctuation
    duplicated_turn   a turn, or a whole exchange, stands there twice in a row
    role_order        a reply before anybody has spoken, two replies in a row, a result without a reply before it, or a system
                      turn in the middle

A conversation is kept or dropped whole. A reply that talks about errors, or is JSON because JSON was asked for, stays.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from step_megatron.data.schema import Audio, Conversation, ConversationFile, SchemaError, Turn, write_conversations
from step_megatron.data.sources import located

# The rest of an exception's text, of a gateway's page or of a proxy's line: a reply that begins so was never written by a model.
_FAILED_CALL = re.compile(
    r"""(error:?\s+|\[error\]\s*)?(
        error\ code:\s*[45]\d\d\b
      | (openai|anthropic|httpx?|requests|aiohttp|google|dashscope|litellm)(\.\w+)*\.\w*(Error|Exception|Timeout|Exhausted)\b
      | (RateLimit|APIConnection|APITimeout|APIStatus|InternalServer|ServiceUnavailable|Authentication|BadRequest)Error\b\s*[:(]
      | Traceback\ \(most\ recent\ call\ last\)
      | (HTTP\ (Error\ )?)?[45]\d\d\ (Bad\ Gateway|Gateway\ Time-?out|Service\ (Temporarily\ )?Unavailable|Internal\ Server\ Error
          |Too\ Many\ Requests|Bad\ Request|Unauthorized|Forbidden)\W*$
      | (Internal\ Server\ Error|Bad\ Gateway|Gateway\ Time-?out|Connection\ error|Request\ timed\ out|Read\ timed\ out)\W*$
      | Request\ failed\ with\ status\ code\ [45]\d\d
      | upstream\ connect\ error\ or\ disconnect
      | (?:<!doctype\ html[^>]*>\s*)?<html\b.*?<title>\s*[45]\d\d\b
    )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
# Who speaks of these may be answered with an error's text or with JSON.
_ASKED_FOR = re.compile(
    r"json|error|exception|traceback|http|\bapi\b|status code|错误|报错|异常|fehler|erreur|ошибк", re.IGNORECASE
)
_FAILED_CODE = re.compile(r"[45]\d\d|[1-9]\d{4,}|\w*(error|exceeded|exhausted|unavailable|timeout)\w*", re.IGNORECASE)
_MESSAGE_KEYS = {"message", "msg", "errmsg", "error_msg", "detail", "reason"}
_CODE_KEYS = {"code", "status", "status_code", "statuscode", "errcode", "error_code", "type", "error_type", "request_id", "param"}
_DIALOGUE = {"human", "assistant"}


def api_error(conversation: Conversation) -> str | None:
    """A reply, or its reasoning, that is a failed call's text; not where a user or a tool's result speaks of such."""
    if any(_ASKED_FOR.search(turn.text) for turn in conversation.turns if turn.role in ("human", "system", "function_output")):
        return None
    for number, text in _written(conversation):
        if _FAILED_CALL.match(text.strip()) or _ends_with_error_json(text.strip()):
            return f"turns[{number}]: {_shortened(text)}"
    return None


def empty_reasoning(conversation: Conversation) -> str | None:
    """Reasoning that was written down but says nothing; a reply without the field is one that does not reason."""
    for number, turn in _trained(conversation):
        if turn.reasoning is not None and not _says_something(turn.reasoning):
            return f"turns[{number}].reasoning is {turn.reasoning!r}"
    return None


def near_empty_reply(conversation: Conversation) -> str | None:
    """A trained reply in which nothing is said."""
    for number, turn in _trained(conversation):
        if not _says_something(turn.text):
            return f"turns[{number}].content is {turn.text!r}"
    return None


def duplicated_turn(conversation: Conversation) -> str | None:
    """The same turn twice in a row, or the same exchange. A short request may well be repeated ("Again, please.")."""
    turns = conversation.turns
    for number in range(1, len(turns)):
        before, turn = turns[number - 1], turns[number]
        if _same(before, turn) and turn.content:
            return f"turns[{number}] repeats turns[{number - 1}]"
        if number < 3 or turn.role != "assistant" or not _is_whole_request(before):
            continue
        if _same(turns[number - 3], before) and _same(turns[number - 2], turn):
            return f"turns[{number - 1}] and turns[{number}] repeat the exchange before them"
    return None


def role_order(conversation: Conversation) -> str | None:
    """Roles in an order that no conversation has; several human turns in a row are a user who interrupts himself."""
    seen: list[str] = []
    for number, turn in enumerate(conversation.turns):
        before = seen[-1] if seen else ""
        wrong = {
            "assistant": "human" not in seen or before == "assistant",
            "function_output": before not in ("assistant", "function_output"),
            "system": bool(_DIALOGUE & set(seen)),
            "tool_json_schemas": bool(_DIALOGUE & set(seen)),
        }
        if wrong.get(turn.role, False):
            return f"turns[{number}] is {turn.role} after {before or 'nothing'}"
        seen.append(turn.role)
    return None


FILTERS: dict[str, Callable[[Conversation], str | None]] = {
    each.__name__: each for each in (api_error, empty_reasoning, near_empty_reply, duplicated_turn, role_order)
}


def first_reason(conversation: Conversation, names: Iterable[str]) -> str | None:
    """`FILTER: what it found`, of the first of the named filters that drops the conversation; None if it is kept."""
    for name in names:
        if found := FILTERS[name](conversation):
            return f"{name}: {found}"
    return None


def filter_file(path: str | Path, out: str | Path, dropped: str | Path, names: Sequence[str] = tuple(FILTERS)) -> dict[str, int]:
    """Write what the filters keep of a conversation file to `out`, and a line for everything else to `dropped`.

    A line of `dropped` is `{"id", "source", "line", "filter", "reason"}`. Addresses of clips mean the same in `out` as in `path`.

    Returns:
        Conversations `kept`, and dropped by each filter.

    Raises:
        SchemaError: a line that is not a conversation (nothing is written), or an `out` that is `path`.
    """
    path, out, dropped = Path(path), Path(out), Path(dropped)
    if out.resolve() == path.resolve():
        raise SchemaError(f"{path}: --out is the file that is read; name another one")
    counts: Counter[str] = Counter({"kept": 0, **dict.fromkeys(names, 0)})
    lines: list[str] = []

    def kept() -> Iterator[Conversation]:
        for line, conversation in ConversationFile(path).numbered():
            reason = first_reason(conversation, names)
            name, _, found = (reason or "kept").partition(": ")
            counts[name] += 1
            if reason is None:
                yield located(conversation, path, out.parent)
            else:
                entry = {"id": conversation.id, "source": conversation.source, "line": line, "filter": name, "reason": found}
                lines.append(json.dumps(entry, ensure_ascii=False) + "\n")

    out.parent.mkdir(parents=True, exist_ok=True)
    write_conversations(out, kept())
    dropped.write_text("".join(lines), encoding="utf-8")
    return dict(counts)


def _written(conversation: Conversation) -> Iterator[tuple[int, str]]:
    """Every reply and every reasoning, with the number of its turn."""
    for number, turn in enumerate(conversation.turns):
        if turn.role == "assistant":
            yield number, turn.text
            yield number, turn.reasoning or ""


def _trained(conversation: Conversation) -> Iterator[tuple[int, Turn]]:
    return ((number, turn) for number, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.train)


def _says_something(text: str) -> bool:
    """Whether a text has a letter, a number or a sign (an emoji) beside punctuation and spaces."""
    return any(unicodedata.category(sign)[0] in "LNS" for sign in text)


def _same(first: Turn, second: Turn) -> bool:
    return (first.role, first.content, first.reasoning) == (second.role, second.content, second.reasoning)


def _is_whole_request(turn: Turn) -> bool:
    """Whether a human turn can be understood by itself: it has a clip or a sentence's length."""
    return turn.role == "human" and (any(isinstance(item, Audio) for item in turn.content) or len(turn.text.split()) > 4)


def _ends_with_error_json(text: str) -> bool:
    """Whether a text ends with a JSON object in the form of an API's error (Python's spelling of it too)."""
    if not text.endswith("}"):
        return False
    for start in (found.start() for found in re.finditer(r"\{", text)):
        value = _as_object(text[start:])
        if value is not None:
            return _is_error(value, alone=start == 0)
    return False


def _as_object(text: str) -> dict | None:
    for candidate in (text, text.replace("'", '"').replace("None", "null").replace("True", "true").replace("False", "false")):
        try:
            value = json.loads(candidate)
        except ValueError:
            continue
        return value if isinstance(value, dict) else None
    return None


def _is_error(value: dict, alone: bool) -> bool:
    """Whether an object is an API's error: `error` with a message and a code, or, standing alone, a failed code and a message."""
    keys = {str(key).lower(): item for key, item in value.items()}
    error = keys.get("error")
    inner = {str(key).lower() for key in error} if isinstance(error, dict) else set()
    if inner & _MESSAGE_KEYS and inner & _CODE_KEYS:
        return True
    if not alone:
        return False
    said = isinstance(error, str) and error.lower() not in ("", "no", "none", "null", "false", "ok")
    if inner & _MESSAGE_KEYS or (said and keys.keys() & (_CODE_KEYS | _MESSAGE_KEYS)):
        return True
    codes = [str(keys[name]) for name in _CODE_KEYS & keys.keys()]
    return any(_FAILED_CODE.fullmatch(code) for code in codes) and bool(keys.keys() & _MESSAGE_KEYS)


def _shortened(text: str, length: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."
