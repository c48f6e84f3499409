"""Conversation -> token ids, loss mask and audio placeholders, the same for training and for generation.

`step-audio` (the released models' template; a turn without reasoning has an empty line between the marks):

    <|BOT|>system\\n...<|EOT|><|BOT|>human\\n...<|EOT|><|BOT|>assistant\\n<think>\\n{reasoning}\\n</think>\\n{response}<|EOT|>

`chatml` (Qwen; the model itself decides to think, so `<think>` is part of the reply):

    <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n<think>\\n{reasoning}\\n</think>\\n\\n{response}<|im_end|>\\n

No role is dropped: tools are a `tool_json_schemas` turn, their results `function_output` turns. A 25 s chunk of audio is
`<audio_start>`, its `<audio_patch>` placeholders, `<audio_end>`; a longer clip is several such runs.

Text is encoded piece by piece, cut at every special, at the end of the turn's header and where the prompt ends, so BPE never
merges over the place where generation starts: the prompt's tokens are a prefix of the training sample's. Specials enter as ids;
a special's name inside a conversation's text is plain text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from step_megatron.data.aspects import aspect_of
from step_megatron.data.schema import ROLES, Audio, Conversation, Turn
from step_megatron.data.tokenizer import Tokenizer

# The marks around reasoning; both are special tokens.
THINK_START, THINK_END = "<think>", "</think>"


class TemplateError(ValueError):
    """A conversation cannot be rendered; the message names it and the remedy."""


@dataclass(frozen=True)
class Template:
    """The parts in which templates differ.

    Attributes:
        open, close: special tokens around a turn; `close` ends a reply, so generation stops there.
        after: text between two turns.
        roles: the schema's role -> the name written in the header.
        prompt_thinks: whether the prompt ends with `<think>` and a newline (then every reply has the marks).
        after_thinking: text between `</think>` and the response.
    """

    open: str
    close: str
    after: str
    roles: dict[str, str]
    prompt_thinks: bool
    after_thinking: str


TEMPLATES = {
    "step-audio": Template("<|BOT|>", "<|EOT|>", "", {role: role for role in ROLES}, True, "\n"),
    "chatml": Template(
        "<|im_start|>",
        "<|im_end|>",
        "\n",
        {
            "system": "system",
            "human": "user",
            "assistant": "assistant",
            "function_output": "tool",
            "tool_json_schemas": "tool_json_schemas",
        },
        False,
        "\n\n",
    ),
}


@dataclass(frozen=True)
class AudioSpan:
    """The placeholders of one 25 s chunk.

    Attributes:
        address: the clip.
        chunk: index of the chunk in the clip.
        start: index of the first `<audio_patch>`, in the sample or, in a micro-batch, in the packed row.
        tokens: how many there are.
    """

    address: str
    chunk: int
    start: int
    tokens: int


@dataclass(frozen=True)
class TokenizedSample:
    """One rendered conversation.

    Attributes:
        id, source, aspect: the conversation's (`aspects.aspect_of`).
        input_ids: int32 `[n]`.
        loss_mask: uint8 `[n]`; 1 = this token is a target, predicted from those before it. The first is never one.
        audio: the chunks in order.
    """

    id: str
    source: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    audio: tuple[AudioSpan, ...]
    aspect: str = ""

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return int(self.loss_mask.sum())


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    clip_tokens: Callable[[str], list[int]],
    template: str = "step-audio",
    generation: bool = False,
) -> TokenizedSample:
    """Render a conversation.

    Args:
        clip_tokens: address -> placeholders of every chunk of the clip (`audio.geometry.clip_tokens` of its indexed length).
        template: a key of `TEMPLATES`.
        generation: make the prompt of a reply instead: of the last turn where that is the assistant's (its content is left out),
            else of a new turn. No token of a prompt is a target.

    Targets are, of every assistant turn with `train`: the reasoning, `</think>`, the response and the closing token, that is,
    every token that generation would have to write after the prompt; with `train` "content", the response and the closing token.

    Raises:
        TemplateError: an unknown template or role, no turn, audio in an assistant turn, or a clip too short for a token.
    """
    if template not in TEMPLATES:
        raise TemplateError(f"unknown template {template!r}; set tokenizer.template to one of {', '.join(TEMPLATES)}")
    if not conversation.turns:
        raise TemplateError(f"conversation {conversation.id!r} has no turn; add one")
    builder = _Builder(conversation.id, tokenizer, clip_tokens, TEMPLATES[template])
    turns = conversation.turns
    if generation and turns[-1].role == "assistant":
        turns = turns[:-1]
    for turn in turns:
        builder.turn(turn)
    if generation:
        builder.prompt()
    ids = np.array(builder.ids, np.int32)
    mask = np.zeros(len(ids), np.uint8) if generation else np.array(builder.mask, np.uint8)
    aspect = aspect_of(conversation.meta)
    return TokenizedSample(conversation.id, conversation.source, ids, mask, tuple(builder.audio), aspect)


def encoded_texts(conversation: Conversation, template: str = "step-audio") -> list[str]:
    """Every piece of text that `render` encodes, headers included: what a compact vocabulary must be counted on.

    Raises:
        TemplateError: as `render`.
    """
    recorder = _Recorder()
    render(conversation, recorder, lambda address: [1], template)
    return recorder.texts


class _Recorder:
    """Stands in for the tokenizer and keeps what it is asked to encode."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return []

    def special(self, name: str) -> int:
        return 0


class _Builder:
    """Ids, mask and spans of one conversation while it is rendered."""

    def __init__(self, name: str, tokenizer: Tokenizer, clip_tokens: Callable[[str], list[int]], template: Template):
        self.name, self.tokenizer, self.clip_tokens, self.template = name, tokenizer, clip_tokens, template
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.audio: list[AudioSpan] = []

    def add(self, ids: list[int], target: bool) -> None:
        self.ids += ids
        self.mask += [int(target)] * len(ids)

    def special(self, name: str, target: bool = False) -> None:
        self.add([self.tokenizer.special(name)], target)

    def text(self, text: str, target: bool = False) -> None:
        if text:
            self.add(self.tokenizer.encode(text), target)

    def header(self, role: str) -> None:
        if role not in self.template.roles:
            known = ", ".join(self.template.roles)
            raise TemplateError(f"conversation {self.name!r} has a turn of the unknown role {role!r}; write one of {known}")
        self.special(self.template.open)
        self.text(f"{self.template.roles[role]}\n")

    def prompt(self) -> None:
        """What generation is given of an assistant turn."""
        self.header("assistant")
        if self.template.prompt_thinks:
            self.special(THINK_START)
            self.text("\n")

    def turn(self, turn: Turn) -> None:
        if turn.role == "assistant":
            self.prompt()
            self.reply(turn)
        else:
            self.header(turn.role)
            for item in turn.content:
                self.clip(item.address) if isinstance(item, Audio) else self.text(item.text)
            self.special(self.template.close)
        self.text(self.template.after)

    def reply(self, turn: Turn) -> None:
        """What generation has to write of an assistant turn."""
        if any(isinstance(item, Audio) for item in turn.content):
            raise TemplateError(
                f"conversation {self.name!r} has audio in an assistant turn; the model writes text only: remove it"
            )
        content = turn.train is not False
        thinking = content and turn.train != "content"
        if turn.reasoning or self.template.prompt_thinks:
            if not self.template.prompt_thinks:
                self.special(THINK_START, thinking)
                self.text("\n", thinking)
            self.text(f"{turn.reasoning or ''}\n", thinking)
            self.special(THINK_END, thinking)
            self.text(self.template.after_thinking, thinking)
        self.text(turn.text, content)
        self.special(self.template.close, content)

    def clip(self, address: str) -> None:
        """Placeholders of one clip, a run for every chunk."""
        chunks = self.clip_tokens(address)
        if not chunks or min(chunks) < 1:
            raise TemplateError(
                f"conversation {self.name!r}: clip {address!r} is too short for a token; run `step-megatron data validate`"
            )
        for chunk, tokens in enumerate(chunks):
            self.special("<audio_start>")
            self.audio.append(AudioSpan(address, chunk, len(self.ids), tokens))
            self.add([self.tokenizer.special("<audio_patch>")] * tokens, False)
            self.special("<audio_end>")
