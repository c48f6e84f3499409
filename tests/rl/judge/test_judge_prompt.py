"""The judge's prompt: what it shows, what it never shows, and that no reply can get out of its quotation."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.config.load import ConfigError
from step_megatron.data.schema import Audio, Text, Turn, parse_line, to_record
from step_megatron.rl.judge.prompt import Pair, build_prompt, quote
from step_megatron.rl.judge.scale import Scale
from tests.rl.judge.hostile import HOSTILE

HISTORY = (
    Turn("system", (Text("Be brief."),)),
    Turn("human", (Audio("a.wav"), Text("What is said?"))),
    Turn("assistant", (Text("hello"),), reasoning="secret thoughts"),
    Turn("human", (Text("And how?"), Audio("b.wav"))),
)


def body(pair: Pair, swapped: bool = False, **settings) -> str:
    """The text of the human turn, clips by their address."""
    content = build_prompt(pair, swapped, Scale(), **settings).turns[1].content
    return "".join(f"[{item.address}]" if isinstance(item, Audio) else item.text for item in content)


def test_the_prompt_as_it_is_read():
    pair = Pair("p", HISTORY, "Gently.", 'He said "no".', ("Names the manner.", "One word."))
    assert body(pair) == (
        'Conversation:\nsystem: "Be brief."\nhuman: [a.wav] "What is said?"\nassistant: "hello"\nhuman: "And how?" [b.wav]\n'
        'Reply 1: "Gently."\nReply 2: "He said \\"no\\"."\nCriteria:\n1. "Names the manner."\n2. "One word."\n'
    )


def test_swapping_exchanges_the_replies_and_nothing_else():
    pair = Pair("p", HISTORY, "mine", "theirs")
    assert body(pair, swapped=True) == body(Pair("p", HISTORY, "theirs", "mine"))


def test_without_a_rubric_there_are_no_criteria_and_reasoning_is_never_shown():
    text = body(Pair("p", HISTORY, "mine", "theirs"))
    assert "Criteria" not in text and "secret" not in text


def test_the_instructions_name_the_scale_and_the_form():
    full, brief, no_tie = (
        build_prompt(Pair("p", (), "a", "b"), False, Scale(levels), name).turns[0].text
        for levels, name in ((7, "full"), (7, "brief"), (6, "full"))
    )
    assert '{"rubric": [' in full and '"overall": level}' in full
    assert "3: reply 1 is much better" in full and "0: both are equally good" in full
    assert "equally" not in no_tie
    assert "3 (reply 1) to -3 (reply 2)" in brief


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_hostile_reply_stays_in_its_quotation(name, swapped):
    """The prompt differs from that of a harmless reply inside one quotation alone, and the judge can read all of it."""
    reply = HOSTILE[name]
    text = body(Pair("p", HISTORY, reply, "the reference"), swapped, max_characters=200_000)
    label = "Reply 2" if swapped else "Reply 1"
    lines = [line for line in text.split("\n") if line.startswith(f"{label}: ")]
    assert len(lines) == 1 and len(text.splitlines()) == len(body(Pair("p", HISTORY, "x", "y")).splitlines())
    quoted = lines[0].removeprefix(f"{label}: ")
    assert json.loads(quoted) == reply
    assert text == body(Pair("p", HISTORY, "@", "the reference"), swapped).replace('"@"', quoted)
    assert "<" not in text


@given(st.text() | st.text(alphabet='<>/|"\\\n\u2028\u0085`{}think\ud800'))
def test_quotation_holds_whatever_the_text(text):
    quoted = quote(text)
    assert json.loads(quoted) == text
    assert "<" not in quoted and len(quoted.splitlines()) == 1
    assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', quoted, re.DOTALL)
    quoted.encode()


def test_a_long_reply_is_cut_in_the_middle_said_so_and_counted():
    reply = "a" * 50_000 + "b" * 50_000
    pair = Pair("p", (), reply, "short")
    prompt = build_prompt(pair, False, Scale(), max_characters=1000)
    text = prompt.turns[1].text
    assert prompt.meta["cut"] == 99_000 and len(text) < 1300
    assert f'"{"a" * 500}" (99000 characters left out here) "{"b" * 500}"' in text
    assert build_prompt(pair, False, Scale(), max_characters=100_000).meta["cut"] == 0


def test_a_prompt_is_a_conversation_that_can_be_written_down():
    prompt = build_prompt(Pair("p", HISTORY, "a", "b", ("c",)), True, Scale())
    assert parse_line(json.dumps(to_record(prompt)), "x:1") == prompt
    assert prompt.audio_addresses() == ("a.wav", "b.wav")


@pytest.mark.parametrize(
    ("levels", "values"), [(7, (-3, -2, -1, 0, 1, 2, 3)), (6, (-3, -2, -1, 1, 2, 3)), (2, (-1, 1)), (11, tuple(range(-5, 6)))]
)
def test_scales(levels, values):
    scale = Scale(levels)
    assert scale.values == values and len(values) == levels
    assert [scale.reward(level) for level in (scale.best, -scale.best, 0)] == [1, -1, 0]
    assert len(scale.describe().split("\n")) == levels


def test_a_scale_of_one_level_is_refused():
    with pytest.raises(ConfigError, match="at least 2 levels"):
        Scale(1)
