"""Aspects: validated with file, line and field; the means that a sample's losses are part of."""

import json

import pytest

from step_megatron.data.aspects import ASPECTS, LossGroup, aspect_of
from step_megatron.data.schema import SchemaError, parse_line


def line(**meta) -> str:
    turns = [{"role": "human", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    return json.dumps({"id": "a", "source": "s", "turns": turns, "meta": meta})


def test_every_aspect_and_kind_is_read():
    for aspect, kinds in ASPECTS.items():
        assert aspect_of(parse_line(line(aspect=aspect), "f:1").meta) == aspect
        for kind in kinds:
            assert aspect_of(parse_line(line(aspect=aspect, aspect_kind=kind), "f:1").meta) == f"{aspect}.{kind}"
    assert aspect_of(parse_line(line(task="x"), "f:1").meta) == ""


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"aspect": "politeness"}, r"^f:7: field `meta\.aspect` is 'politeness'; write one of continuity, instruction_following"),
        ({"aspect": ["continuity"]}, r"field `meta\.aspect` is \['continuity'\]"),
        ({"aspect": None}, r"field `meta\.aspect` is None"),
        ({"aspect_kind": "revision"}, r"field `meta\.aspect_kind` is set without meta\.aspect"),
        ({"aspect": "continuity", "aspect_kind": "revision"}, r"`meta\.aspect_kind` is 'revision'; write one of context, constr"),
        ({"aspect": "naturalness", "aspect_kind": "tone"}, r"naturalness has no kinds: remove it"),
        ({"aspect": "continuity", "aspect_kind": {}}, r"`meta\.aspect_kind` is \{\}"),
    ],
)
def test_a_wrong_tag_is_named_by_place_and_field(meta, message):
    with pytest.raises(SchemaError, match=message):
        parse_line(line(**meta), "f:7")


def test_a_kind_counts_for_its_aspect_too():
    group = LossGroup("chats", "interaction_awareness.revision")
    assert group.metrics == ("loss/chats", "aspect_loss/interaction_awareness", "aspect_loss/interaction_awareness.revision")
    assert LossGroup("chats", "naturalness").metrics == ("loss/chats", "aspect_loss/naturalness")
    assert LossGroup("chats").metrics == ("loss/chats",)
