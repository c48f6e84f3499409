"""A judge's verdict: how it is written, and the strict reader that takes nothing else for one.

    reasoning </think> {"rubric": [2, 0], "overall": 1}

The object stands after the judge's one `</think>`, alone, in a Markdown fence or not. A text with two `</think>` is refused, not
guessed at: one of them may come from a reply that the judge was made to repeat. So is everything that can be read in two ways.
What cannot be read is a failed judgment, and never a neutral one.
"""

import json
import re
from typing import Any

from step_megatron.data.preferences import Verdict
from step_megatron.data.template import THINK_END
from step_megatron.rl.judge.scale import Scale

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)
# End-of-turn marks that a decoder may leave at the end.
_TRAILING_MARKS = re.compile(r"(?:\s*<\|[^|<>]{1,40}\|>)+\s*\Z")
_KEYS = {"rubric", "overall"}
# A verdict is short; what is longer is not one, and is not parsed.
_LONGEST = 10_000


class VerdictError(ValueError):
    """A text that holds no verdict.

    Attributes:
        kind: `unfinished` (no `</think>`), `ambiguous` (several), `not_json`, `missing` (a key, or a criterion's level),
            `conflicting` (a key twice, several objects, criteria that all contradict the whole), `out_of_range`, `wrong_type`.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def write_verdict(verdict: Verdict) -> str:
    """The JSON that `parse_verdict` reads."""
    return json.dumps({"rubric": list(verdict.rubric), "overall": verdict.overall})


def parse_verdict(text: str, scale: Scale, criteria: int) -> Verdict:
    """Read what a judge wrote, from inside its thinking on.

    Args:
        criteria: of the rubric; the verdict has a level for each.

    Raises:
        VerdictError: there is not exactly one verdict, or it is not right.
    """
    thinking, end, answer = text.partition(THINK_END)
    if not end:
        raise VerdictError("unfinished", f"there is no {THINK_END}")
    if THINK_END in answer:
        raise VerdictError("ambiguous", f"there is more than one {THINK_END}")
    record = _json(_TRAILING_MARKS.sub("", answer).strip())
    if not isinstance(record, dict):
        raise VerdictError("wrong_type", "the answer is not a JSON object")
    if missing := _KEYS - record.keys():
        raise VerdictError("missing", f"the verdict has no `{min(missing)}`")
    if unknown := record.keys() - _KEYS:
        raise VerdictError("wrong_type", f"the verdict has the unknown key {min(unknown)[:40]!r}")
    if not isinstance(record["rubric"], list):
        raise VerdictError("wrong_type", "`rubric` is not a list")
    if len(record["rubric"]) != criteria:
        raise VerdictError("missing", f"`rubric` has {len(record['rubric'])} levels for {criteria} criteria")
    verdict = Verdict(tuple(_level(level, scale) for level in record["rubric"]), _level(record["overall"], scale))
    if verdict.rubric and (max(verdict.rubric) < 0 < verdict.overall or verdict.overall < 0 < min(verdict.rubric)):
        raise VerdictError("conflicting", "every criterion favours one reply, the overall level the other")
    return verdict


def _json(answer: str) -> Any:
    if fenced := _FENCE.fullmatch(answer):
        answer = fenced[1].strip()
    if len(answer) > _LONGEST:
        raise VerdictError("not_json", f"{len(answer)} characters are no verdict")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise VerdictError("conflicting", "a key is written twice")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise VerdictError("not_json", f"{name} is not JSON")

    try:
        return json.loads(answer, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and answer[error.pos : error.pos + 1] == "{":
            raise VerdictError("conflicting", "there are several objects") from None
        raise VerdictError("not_json", f"the answer is not one JSON object ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, VerdictError):
            raise
        # Nesting without end, a number of thousands of digits.
        raise VerdictError("not_json", f"the answer is not readable as JSON ({type(error).__name__})") from None


def _level(value: Any, scale: Scale) -> int:
    # `true` and `2.0` are no levels; Python would take them.
    if type(value) is not int:
        raise VerdictError("wrong_type", f"a level is {type(value).__name__}, not a whole number")
    if value not in scale.values:
        raise VerdictError("out_of_range", f"a level is not one of {', '.join(map(str, scale.values))}")
    return value
