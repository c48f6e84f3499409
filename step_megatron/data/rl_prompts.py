"""Prompts of PPO: conversations up to the reply that the policy is to write, with what the reply can be rewarded by. JSONL:

    {"id": "ast-17", "source": "asterisk", "meta": {"split": "train", "task": "language"},
     "history": [{"role": "human", "content": [{"type": "audio", "audio": "17.wav"}, {"type": "text", "text": "Language?"}]}],
     "reference": "It is Italian.", "reference_from": "data", "rubric": ["Names the language."],
     "answer": "Italian", "check": "exact"}

- `history` is turns as in a conversation (`schema`), audio included; addresses are relative to the file.
- `reference` is a reply without reasoning that a judge holds the policy's against, and `reference_from` says where it is from
  (`preferences`). With a `rubric` (criteria) the judgment follows it; without, it is a plain preference.
- `answer` is the one right answer, for a verifiable reward, and `check` how it is compared: one of `CHECKS`; `multiple_choice`
  needs `choices`, in the order of their letters.

A prompt may have a reference, an answer, both, or neither (rewards by length or reasoning alone).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_megatron.data.preferences import RecordChecker, read_records
from step_megatron.data.schema import Conversation, Turn, kind_of, parse_json, turn_records, write_lines

# How a reply is compared with the one right answer: `rl.verifiable` has the functions.
CHECKS = ("exact", "numeric", "multiple_choice", "word_error_rate")
_REQUIRED = {"id", "source", "history"}
_OPTIONAL = {"meta", "reference", "reference_from", "rubric", "answer", "check", "choices"}


@dataclass(frozen=True)
class RLPrompt:
    """One record; see the module. `reference` and `answer` are None where there is none."""

    id: str
    source: str
    history: tuple[Turn, ...]
    reference: str | None = None
    reference_from: str = "data"
    rubric: tuple[str, ...] = ()
    answer: str | None = None
    check: str = "exact"
    choices: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def conversation(self) -> Conversation:
        """The history as a conversation that lacks its reply."""
        return Conversation(self.id, self.source, self.history)


def read_rl_prompts(path: str | Path) -> list[RLPrompt]:
    """Read and validate a whole file; blank lines are skipped.

    Raises:
        SchemaError: no such file, an empty one, a line that is no prompt, or an id that occurs twice.
    """
    return read_records(path, parse_rl_prompt, "prompt")


def write_rl_prompts(path: str | Path, prompts: Iterable[RLPrompt]) -> int:
    """Write a JSONL file atomically, each prompt validated as a reader would; returns their number.

    Raises:
        SchemaError: a prompt is not valid; nothing is written.
    """
    return write_lines(path, map(rl_prompt_record, prompts), parse_rl_prompt)


def rl_prompt_record(prompt: RLPrompt) -> dict[str, Any]:
    """The JSON object of one line."""
    record = {"id": prompt.id, "source": prompt.source, "meta": prompt.meta, "history": turn_records(prompt.history)}
    if prompt.reference is not None:
        record |= {"reference": prompt.reference, "reference_from": prompt.reference_from}
    if prompt.rubric:
        record["rubric"] = list(prompt.rubric)
    if prompt.answer is not None:
        record |= {"answer": prompt.answer, "check": prompt.check}
    if prompt.choices:
        record["choices"] = list(prompt.choices)
    return record


def parse_rl_prompt(line: str | bytes, where: str) -> RLPrompt:
    """Parse one line; `where` ("file:line") opens every error message.

    Raises:
        SchemaError: names the place, the field, and what to write instead.
    """
    return _PromptChecker(where).prompt(parse_json(line, where))


class _PromptChecker(RecordChecker):
    def prompt(self, record: Any) -> RLPrompt:
        self.keys(record, "prompt", _REQUIRED, _OPTIONAL)
        reference, answer = record.get("reference"), record.get("answer")
        for name, needs in (("reference_from", "reference"), ("rubric", "reference"), ("check", "answer"), ("choices", "answer")):
            if name in record and needs not in record:
                raise self.fail(name, f"is set without `{needs}`", f"add the {needs}, or remove it")
        prompt = RLPrompt(
            id=self.string(record["id"], "id"),
            source=self.string(record["source"], "source"),
            history=self.turns(record["history"], "history"),
            reference=None if reference is None else self.string(reference, "reference", may_be_empty=True),
            reference_from=self.reference_from(record.get("reference_from", "data")),
            rubric=self.rubric(record.get("rubric")),
            answer=None if answer is None else self.string(answer, "answer", may_be_empty=True),
            check=self.check(record.get("check", "exact")),
            choices=self.choices(record.get("choices", [])),
            meta=self.meta(record.get("meta", {})),
        )
        if prompt.check == "multiple_choice" and answer not in prompt.choices:
            raise self.fail("choices", f"has no {answer!r}, the answer", "list all choices, the right one among them")
        if prompt.history[-1].role == "assistant":
            raise self.fail("history", "ends with the assistant's turn", "end it before the reply that the policy is to write")
        return prompt

    def check(self, check: Any) -> str:
        if check not in CHECKS:
            raise self.fail("check", f"is {check!r}", f"write one of {', '.join(CHECKS)}")
        return check

    def choices(self, choices: Any) -> tuple[str, ...]:
        if not isinstance(choices, list):
            raise self.fail("choices", f"is {kind_of(choices)}", "write a list of strings")
        return tuple(self.string(choice, f"choices[{i}]") for i, choice in enumerate(choices))
