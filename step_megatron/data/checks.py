"""Checks: what a reply must be, as facts that a program holds it against, without a judge.

`meta.checks` of a conversation has an entry for every assistant turn, null where anything will do, or an object of

    has     words or phrases that the reply must hold, case and punctuation aside
    lacks   those that it must not hold, such as the other labels of a closed set
    form    one_word, sentence (a capital, at least three words, a full stop), capitals, or question
    starts  text with which it begins       ends  text with which it ends, final punctuation aside
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

FORMS = ("one_word", "sentence", "capitals", "question")
_SENTENCE_WORDS = 3


@dataclass(frozen=True)
class Check:
    """See the module; an empty field asks for nothing."""

    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    form: str = ""
    starts: str = ""
    ends: str = ""

    def content(self, reply: str) -> bool:
        """Whether a reply holds what it must, and nothing that it must not."""
        words = f" {_words(reply)} "
        return all(f" {_words(text)} " in words for text in self.has) and not any(
            f" {_words(text)} " in words for text in self.lacks
        )

    def kept_form(self, reply: str) -> bool:
        """Whether a reply has the form, the beginning and the end that it must have."""
        reply = reply.strip()
        begins = reply.startswith(self.starts)
        return begins and reply.rstrip(".!?").endswith(self.ends) and (not self.form or _FORMS[self.form](reply))

    def passes(self, reply: str) -> bool:
        return self.content(reply) and self.kept_form(reply)

    def record(self) -> dict[str, Any]:
        """The JSON object, without what it does not ask for."""
        given = {"has": list(self.has), "lacks": list(self.lacks), "form": self.form, "starts": self.starts, "ends": self.ends}
        return {name: value for name, value in given.items() if value}


def read_check(record: Any) -> Check | None:
    """A check from its JSON value.

    Raises:
        ValueError: an unknown key, form or type; says what to write.
    """
    if record is None:
        return None
    if not isinstance(record, dict):
        raise ValueError(f"is {record!r}; write null or an object")
    if unknown := record.keys() - {"has", "lacks", "form", "starts", "ends"}:
        raise ValueError(f"has the unknown key {min(unknown)!r}; known are has, lacks, form, starts, ends")
    for name in ("has", "lacks"):
        value = record.get(name, [])
        if not isinstance(value, list) or not all(isinstance(text, str) and _words(text) for text in value):
            raise ValueError(f"has {name}={value!r}; write a list of texts that have a word")
    for name in ("form", "starts", "ends"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"has {name}={record[name]!r}; write a string")
    if record.get("form", "") not in ("", *FORMS):
        raise ValueError(f"has form={record['form']!r}; write one of {', '.join(FORMS)}")
    return Check(**record | {name: tuple(record.get(name, ())) for name in ("has", "lacks")})


def _words(text: str) -> str:
    """Words of a text, in lower case, between single spaces."""
    return " ".join(re.findall(r"[^\W_]+(?:['’][^\W_]+)*", unicodedata.normalize("NFKC", text).casefold()))


def _is_sentence(reply: str) -> bool:
    return reply[:1].isupper() and reply.endswith((".", "!")) and len(reply.split()) >= _SENTENCE_WORDS


def _is_question(reply: str) -> bool:
    return reply[:1].isupper() and reply.endswith("?")


_FORMS = {
    "one_word": lambda reply: len(_words(reply).split()) == 1,
    "sentence": _is_sentence,
    "capitals": lambda reply: reply.upper() == reply and any(map(str.isalpha, reply)),
    "question": _is_question,
}
