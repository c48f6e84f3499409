"""Verifiable rewards: how right a reply is against the one right answer, 0 .. 1, by one of four checks.

- `exact`: the normalised reply is the normalised answer;
- `numeric`: the last number of the reply equals the answer;
- `multiple_choice`: the reply names the right choice, by letter or by text, and no other;
- `word_error_rate`: one minus the word error rate, not below zero.

The reply is what follows the reasoning; without an end of reasoning there is none, and it scores zero.
"""

import math
import re
from collections.abc import Callable, Sequence

from step_megatron.evaluation.scoring import edit_distance, normalise_label, normalise_transcript

_NUMBER = re.compile(r"[-−+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-−+]?\.\d+")
# `B`, `(B)`, `B.`, `B) the cat`: a letter alone or with a mark; "A cat" is no choice A.
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:]|\Z)(?=\s|\Z)")


def exact(reply: str, answer: str, choices: Sequence[str]) -> float:
    """1 where the normalised reply is the normalised answer."""
    return float(normalise_label(reply) == normalise_label(answer))


def numeric(reply: str, answer: str, choices: Sequence[str]) -> float:
    """1 where the last number of the reply equals the answer's.

    Raises:
        ValueError: the answer holds no number.
    """
    found, wanted = _last_number(reply), _last_number(answer)
    if wanted is None:
        raise ValueError(f"the answer {answer!r} holds no number, which the check `numeric` needs; use another check for it")
    return float(found is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9))


def multiple_choice(reply: str, answer: str, choices: Sequence[str]) -> float:
    """1 where the reply names the right one of `choices`, and no other.

    Raises:
        ValueError: the answer is none of them.
    """
    names = [normalise_label(choice) for choice in choices]
    if normalise_label(answer) not in names:
        raise ValueError(f"the answer {answer!r} is none of the choices {list(choices)}")
    return float(_named_choice(reply, names) == names.index(normalise_label(answer)))


def word_error_rate(reply: str, answer: str, choices: Sequence[str]) -> float:
    """One minus the reply's word error rate, not below zero."""
    wanted, said = normalise_transcript(answer).split(), normalise_transcript(reply).split()
    # A longer one scores zero anyway, and the distance takes time that grows with both lengths.
    if len(said) >= 2 * max(1, len(wanted)):
        return 0.0
    return max(0.0, 1 - edit_distance(wanted, said) / max(1, len(wanted)))


# The answer, the reply and the choices (of `multiple_choice`) -> 0 .. 1.
CHECKS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "exact": exact,
    "numeric": numeric,
    "multiple_choice": multiple_choice,
    "word_error_rate": word_error_rate,
}


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").replace("−", "-")) if numbers else None


def _named_choice(reply: str, names: Sequence[str]) -> int | None:
    """Index of the one choice that the reply names; None for none, and for several."""
    text = normalise_label(reply)
    if text in names:
        return names.index(text)
    if letter := _LETTER.match(reply.strip()):
        number = ord(letter[1].upper()) - ord("A")
        rest = normalise_label(reply.strip()[letter.end() :])
        # A letter beside the text of another choice names both.
        mentioned = _mentioned(rest, names)
        return number if number < len(names) and mentioned <= {number} else None
    mentioned = _mentioned(text, names)
    return mentioned.pop() if len(mentioned) == 1 else None


def _mentioned(text: str, names: Sequence[str]) -> set[int]:
    """Choices whose text stands in the reply as whole words, those apart that are a part of a longer one there."""
    found = {i for i, name in enumerate(names) if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)}
    return {i for i in found if not any(i != j and names[i] in names[j] for j in found)}
