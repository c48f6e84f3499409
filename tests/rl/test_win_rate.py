"""Win rates by a program: known replies give the numbers by hand, and runs are compared by their own replies."""

import json

import pytest

from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.data.schema import SchemaError, Text, Turn
from step_megatron.rl.win_rate import summary, win_rate

CHECK = {"has": ["Italian"], "lacks": ["French"], "form": "sentence"}


def prompt(number: int, check: dict | None = CHECK) -> RLPrompt:
    meta = {"task": "language"} | ({"checks": [check]} if check else {})
    return RLPrompt(f"p{number}", "s", (Turn("human", (Text(f"Language {number}?"),)),), answer="Italian", meta=meta)


def test_the_numbers_by_hand():
    after = ["x</think>It is Italian.", "x</think>Italian", "</think>It is French.", "never ends", "</think>It is Italian.", None]
    before = [
        "</think>Italian",
        "</think>Italian",
        "</think>Italian",
        "</think>French",
        "</think>It is French.",
        "</think>Italian",
    ]
    found = win_rate([prompt(i) for i in range(6)], after, before)
    # A sentence beats the bare answer, the same ties, right beats a sentence; no reply and a wrong word are worth nothing both.
    assert (found["wins"], found["ties"], found["losses"], found["n"], found["failed"]) == (2, 2, 1, 5, 1)
    assert found["win_rate"] == 3 / 5 and found["interval"][0] < 3 / 5 < found["interval"][1]
    assert found["after"] == {"right": 3 / 5, "form": 3 / 5, "words": 10 / 5}
    assert found["before"]["right"] == 3 / 5 and found["before"]["form"] == 1 / 5
    assert {(e["question"], e["before"], e["after"]) for e in found["examples"]} >= {("Language 3?", "French", "")}
    assert "win rate 0.600" in summary({**found, "run": "ppo", "against": "sft"})
    json.dumps(found, allow_nan=False)


def test_either_side_may_be_called_the_first():
    after, before = ["</think>It is Italian.", "</think>French"], ["</think>Italian", "</think>Italian"]
    prompts = [prompt(0), prompt(1)]
    assert win_rate(prompts, after, before)["win_rate"] == 1 - win_rate(prompts, before, after)["win_rate"]


def test_a_prompt_that_no_program_can_judge_is_refused():
    with pytest.raises(SchemaError, match="'p0' has no meta.checks"):
        win_rate([prompt(0, None)], ["</think>a"], ["</think>b"])
