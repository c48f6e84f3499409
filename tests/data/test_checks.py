"""Checks of replies: what passes and what does not, by hand; a wrong check is named by file, line and field."""

import json

import pytest

from step_megatron.data.checks import Check, read_check
from step_megatron.data.schema import SchemaError, parse_line


@pytest.mark.parametrize(
    ("check", "passing", "failing"),
    [
        (
            Check(("Italian",), ("French",)),
            ["Italian", "it is ITALIAN.", "Italian, of course"],
            ["", "Italians", "Italian or French"],
        ),
        (Check(("male",), ("female",)), ["A male voice."], ["A female voice.", "female"]),
        (Check(("no", "first", "third"), ("yes",)), ["No, first and then third."], ["No, first.", "Yes: no, first, third"]),
        (Check(form="one_word"), ["fast", "Fast!", "rápida"], ["very fast", "", "..."]),
        (Check(form="sentence"), ["The speech is fast."], ["fast", "Fast.", "the speech is fast.", "The speech is fast"]),
        (Check(form="capitals"), ["FAST", "THE SPEECH IS FAST."], ["Fast", "12"]),
        (Check(form="question"), ["Do you mean clip one?"], ["Clip one.", "do you?"]),
        (Check(("fast",), starts="Certainly"), ["Certainly, it is fast."], ["It is fast, certainly.", "certainly, fast"]),
        (Check(ends="over"), ["The speech is fast, over.", "over"], ["Over and out.", "over the top"]),
        (Check(("fast",), starts="(", ends=")"), ["(fast)"], ["fast", "(fast", "fast)"]),
        (Check(("español",)), ["Es español."], ["Es espanol."]),
        (Check(("clip one",)), ["Clip one."], ["one clip"]),
    ],
)
def test_replies_by_hand(check, passing, failing):
    assert [reply for reply in passing if not check.passes(reply)] == []
    assert [reply for reply in failing if check.passes(reply)] == []
    assert read_check(json.loads(json.dumps(check.record()))) == check


def test_content_and_form_are_told_apart():
    check = Check(("fast",), ("slow",), form="one_word")
    assert (check.content("It is fast."), check.kept_form("It is fast.")) == (True, False)
    assert (check.content("slow"), check.kept_form("slow")) == (False, True)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ([None, None], r"^f:3: field `meta\.checks` is not a list with an entry for each assistant turn; write 1"),
        ({"has": []}, r"`meta\.checks` is not a list"),
        (["yes"], r"`meta\.checks\[0\]` is 'yes'; write null or an object"),
        ([{"have": ["yes"]}], r"`meta\.checks\[0\]` has the unknown key 'have'; known are has"),
        ([{"has": "yes"}], r"has has='yes'; write a list of texts"),
        ([{"lacks": ["..."]}], r"has lacks=\['\.\.\.'\]; write a list of texts that have a word"),
        ([{"form": "haiku"}], r"has form='haiku'; write one of one_word, sentence"),
        ([{"ends": 3}], r"has ends=3; write a string"),
    ],
)
def test_a_wrong_check_is_named_by_place_and_field(checks, message):
    turns = [{"role": "human", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    with pytest.raises(SchemaError, match=message):
        parse_line(json.dumps({"id": "a", "source": "s", "turns": turns, "meta": {"checks": checks}}), "f:3")
