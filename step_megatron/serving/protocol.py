"""OpenAI's chat completions, as much of them as a listening model has: what is asked, what is answered, and what is wrong."""

import base64
import binascii
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.data.template import THINK_END
from step_megatron.errors import UserError
from step_megatron.generation.request import Sampling

_ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "assistant"}
_MOST_SAMPLES = 128
# Understood, and without an effect here.
_IGNORED = {"model", "user", "stream_options", "metadata", "store"}
_KNOWN = {"messages", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "n", "stream", "max_tokens"}
_KNOWN |= {"max_completion_tokens"}


class RequestError(UserError, ValueError):
    """A request that cannot be answered; `status` is HTTP's, `param` the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code

    def body(self) -> dict[str, Any]:
        """As OpenAI says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A chat completion that was asked for.

    Attributes:
        conversation: clips by the names `clip-0`, `clip-1`, ...
        clips: the bytes of each.
        sampling: of the first sample; the others' seeds count on from its seed.
        samples: choices.
        stream: whether tokens are sent as they come.
    """

    conversation: Conversation
    clips: dict[str, bytes]
    sampling: Sampling
    samples: int
    stream: bool


def parse(body: Any, stop_ids: tuple[int, ...], longest_reply: int) -> Request:
    """A request from its JSON.

    Args:
        stop_ids: ids that end a reply.
        longest_reply: tokens of a reply where the request does not say.

    Raises:
        RequestError: names the field.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    if unknown := sorted(set(body) - _KNOWN - _IGNORED):
        raise RequestError(f"{unknown[0]} is not supported here; remove it", unknown[0])
    clips: dict[str, bytes] = {}
    conversation = _conversation(body.get("messages"), clips)

    def number(name: str, default: float, kind: type = float) -> Any:
        value = body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise RequestError(f"{name} must be a {'number' if kind is float else 'whole number'}, got {value!r}", name)
        return kind(value)

    longest = number("max_completion_tokens", number("max_tokens", longest_reply, int), int)
    samples = number("n", 1, int)
    if not 1 <= samples <= _MOST_SAMPLES:
        raise RequestError(f"n={samples}: must be from 1 to {_MOST_SAMPLES}", "n")
    if not isinstance(body.get("stream") or False, bool):
        raise RequestError("stream must be true or false", "stream")
    seed = number("seed", time.time_ns() % 2**62, int)
    if not 0 <= seed < 2**62:
        raise RequestError(f"seed={seed}: must be from 0 to {2**62 - 1}", "seed")
    try:
        sampling = Sampling(
            temperature=number("temperature", 1.0),
            top_p=number("top_p", 1.0),
            top_k=number("top_k", 0, int),
            repetition_penalty=number("repetition_penalty", 1.0),
            seed=seed,
            max_new_tokens=longest,
            stop_ids=stop_ids,
        )
    except ValueError as error:
        name = str(error).partition("=")[0]
        raise RequestError(str(error), "max_tokens" if name == "max_new_tokens" else name) from error
    return Request(conversation, clips, sampling, samples, bool(body.get("stream")))


def _conversation(messages: Any, clips: dict[str, bytes]) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list that holds at least one message", "messages")
    turns = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise RequestError(f"{place}.role must be one of {', '.join(_ROLES)}", f"{place}.role")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RequestError(f"{place}.content must be a string, or a list of parts", f"{place}.content")
        items = tuple(_part(part, f"{place}.content[{i}]", clips) for i, part in enumerate(parts))
        if message["role"] == "assistant" and any(isinstance(item, Audio) for item in items):
            raise RequestError(f"{place}.content: the assistant speaks text only", f"{place}.content")
        turns.append(Turn(_ROLES[message["role"]], items))
    if turns[-1].role == "assistant":
        raise RequestError("the last message is the assistant's: end with the user's", "messages")
    return Conversation("request", "api", tuple(turns))


def _part(part: Any, place: str, clips: dict[str, bytes]) -> Text | Audio:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind != "input_audio":
        raise RequestError(f'{place} must be {{"type": "text", "text": ...}} or {{"type": "input_audio", ...}}', place)
    given = part.get("input_audio")
    try:
        data = base64.b64decode(given["data"], validate=True)
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise RequestError(f"{place}.input_audio.data must be an audio file in base64", f"{place}.input_audio.data") from error
    name = f"clip-{len(clips)}"
    clips[name] = data
    return Audio(name)


@dataclass
class Choice:
    """One sample as it is told: reasoning first, then the answer; what may still change is held back.

    Args:
        decode: ids to text, from inside `<think>` on.
    """

    decode: Callable[[list[int]], str]
    reasoning: str = ""
    answer: str = ""

    def update(self, ids: list[int], final: bool) -> dict[str, str]:
        """What is new in the text of these ids, as a delta of OpenAI's (`reasoning_content`, `content`); empty if nothing is."""
        reasoning, end, answer = self.decode(ids).partition(THINK_END)
        if not final:
            # A character, or `</think>`, may be half there; white space at an end may turn out to be trimmed.
            reasoning, answer = (_certain(reasoning, end), _certain(answer, THINK_END))
        reasoning, answer = reasoning.strip(), answer.strip()
        delta = {"reasoning_content": reasoning[len(self.reasoning) :], "content": answer[len(self.answer) :]}
        self.reasoning, self.answer = reasoning, answer
        return {name: text for name, text in delta.items() if text}

    def message(self) -> dict[str, str]:
        """The whole message."""
        return {"role": "assistant", "content": self.answer, "reasoning_content": self.reasoning}


def _certain(text: str, ended: str) -> str:
    text = text.rstrip("�")
    if ended:
        return text
    held = next((n for n in range(len(THINK_END) - 1, 0, -1) if text.endswith(THINK_END[:n])), 0)
    return text[: len(text) - held]


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
