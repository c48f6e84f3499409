"""Filters drop what a broken teacher wrote and keep what only looks like it; a dropped line is named, and counted."""

import json

import pytest
from data.test_template import conversations, say, talk
from hypothesis import given

from step_megatron.data.filters import FILTERS, filter_file, first_reason
from step_megatron.data.schema import Audio, Conversation, SchemaError, Text, Turn, read_conversations, write_conversations

HEARD = Turn("human", (Audio("a.wav"), Text("What is said?")))


def dropped_by(conversation: Conversation) -> str:
    return (first_reason(conversation, FILTERS) or "").partition(":")[0]


LEAKS = [
    '{"error": {"message": "Rate limit reached for requests", "type": "requests", "param": null, "code": "rate_limit_exceeded"}}',
    '{"error":{"code":400,"message":"The audio is too long"}}',
    "Error code: 429 - {'error': {'message': 'Rate limit', 'type': 'tokens', 'param': None, 'code': 'rate_limit_exceeded'}}",
    '{"code": 500, "msg": "internal server error", "request_id": "7f3a"}',
    '{"status":"error","message":"model overloaded"}',
    '{"code":10013,"message":"invalid audio","data":null}',
    '{"error": "model_overloaded", "status": 503}',
    "openai.RateLimitError: Error code: 429",
    "openai.error.APIConnectionError: Error communicating with OpenAI",
    "[ERROR] Request failed with status code 503",
    "Error: Request failed with status code 502",
    "requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='api')",
    'Traceback (most recent call last):\n  File "call.py", line 3',
    "<html>\r\n<head><title>502 Bad Gateway</title></head><body>nginx</body></html>",
    "<!DOCTYPE html><html><head><title>504 Gateway Time-out</title></head></html>",
    "upstream connect error or disconnect/reset before headers. reset reason: connection failure",
    "503 Service Unavailable",
    "Request timed out.",
    'She says hello. {"error": {"message": "stream was reset", "type": "server_error"}}',
]
LEGITIMATE = [
    "The speaker says that an error occurred and asks to call again.",
    "A 429 error means that too many requests were sent.",
    "Error bars show the spread of the measurements.",
    "Connection errors are what the caller complains about.",
    "She reads out a title: 502 bad gateways to success.",
    '{"language": "Italian", "words": 4}',
    '{"code": 200, "message": "success"}',
    '{"error": null, "text": "hello"}',
    '{"error": "none", "message": "fine"}',
    '{"type": "greeting", "message": "hello"}',
    'She spells: {"error": } and laughs.',
    'The form is ```json\n{"error": {"message": "...", "code": 1}}\n```',
    "Internal server errors were the topic of the talk.",
    "Bad gateway, she says, and hangs up.",
    "Timeout! Both teams leave the field.",
]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leaked_error_is_found_in_a_reply_and_in_reasoning(leak):
    assert dropped_by(talk(HEARD, say("assistant", leak))) == "api_error"
    assert dropped_by(talk(HEARD, say("assistant", "Hello.", reasoning=leak))) == "api_error"
    assert (
        dropped_by(talk(HEARD, say("assistant", "Hello."), say("human", "And?"), say("assistant", f" {leak}\n"))) == "api_error"
    )


@pytest.mark.parametrize("reply", LEGITIMATE)
def test_a_reply_that_speaks_of_errors_or_is_json_stays(reply):
    assert first_reason(talk(HEARD, say("assistant", reply, reasoning="0.8 s of speech")), FILTERS) is None


@pytest.mark.parametrize("leak", LEAKS)
def test_what_was_asked_for_stays(leak):
    asked = say("human", "Show me an error as JSON, as an HTTP API would send it.")
    assert first_reason(talk(asked, say("assistant", leak)), FILTERS) is None
    failed = say("function_output", '{"error": {"message": "no such file", "code": 404}}')
    called = talk(HEARD, say("assistant", "One moment."), failed, say("assistant", leak))
    assert first_reason(called, FILTERS) is None, "a tool failed, and its message is quoted"


OTHERS = {
    "empty_reasoning": [
        talk(HEARD, say("assistant", "Hello.", reasoning="")),
        talk(HEARD, say("assistant", "Hello.", reasoning=" \n ... \n")),
    ],
    "near_empty_reply": [
        talk(HEARD, say("assistant", "")),
        talk(HEARD, say("assistant", " ... ?!\n", reasoning="nothing")),
    ],
    "duplicated_turn": [
        talk(HEARD, HEARD, say("assistant", "Hello.")),
        talk(HEARD, say("assistant", "Hello."), HEARD, say("assistant", "Hello.")),
        talk(HEARD, say("assistant", "Hello."), say("assistant", "Hello.")),
    ],
    "role_order": [
        talk(say("assistant", "Hello.")),
        talk(say("system", "Be brief."), say("assistant", "Hello.")),
        talk(HEARD, say("assistant", "Hello."), say("assistant", "Good bye.")),
        talk(HEARD, say("function_output", "3"), say("assistant", "Three.")),
        talk(HEARD, say("assistant", "Hello."), say("system", "Be brief.")),
    ],
}
KEPT = [
    talk(HEARD, say("assistant", "Hello.")),
    talk(HEARD, say("assistant", "5", reasoning="three and two")),
    talk(HEARD, say("assistant", "👍")),
    talk(HEARD, say("assistant", "", train=False), say("human", "Stop."), say("assistant", "Yes?")),
    talk(HEARD, say("assistant", "Hello."), say("human", "Again."), say("assistant", "Hello.")),
    talk(say("human", "Again."), say("assistant", "Hello."), say("human", "Again."), say("assistant", "Hello.")),
    talk(HEARD, say("assistant", "Hello."), HEARD, say("assistant", "As before: hello.")),
    talk(HEARD, say("human", "No, wait. Which language?"), say("assistant", "Italian.")),
    talk(say("system", "S"), say("tool_json_schemas", "{}"), HEARD, say("assistant", "c"), say("function_output", "1"),
         say("function_output", "2"), say("assistant", "Both.")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "conversation"), [(name, each) for name, found in OTHERS.items() for each in found])
def test_each_filter_finds_what_it_is_for(name, conversation):
    assert FILTERS[name](conversation)


@pytest.mark.parametrize("conversation", KEPT)
def test_natural_conversations_stay(conversation):
    assert first_reason(conversation, FILTERS) is None


@given(conversations)
def test_any_conversation_can_be_asked_about(conversation):
    reason = first_reason(conversation, FILTERS)
    assert reason is None or reason.partition(": ")[0] in FILTERS and reason.partition(": ")[2]


def test_a_file_is_filtered_and_every_dropped_line_is_named(tmp_path):
    made = [KEPT[0], talk(HEARD, say("assistant", LEAKS[0])), OTHERS["role_order"][0], talk(HEARD, say("assistant", "?"))]
    made = [Conversation(f"c{i}", "teacher", each.turns) for i, each in enumerate(made)]
    (tmp_path / "in").mkdir()
    write_conversations(tmp_path / "in/a.jsonl", made)
    first, *rest = (tmp_path / "in/a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in/a.jsonl").write_text("".join([first, "\n", *rest]))
    counts = filter_file(tmp_path / "in/a.jsonl", tmp_path / "out/kept.jsonl", tmp_path / "out/dropped.jsonl")
    assert counts == {"kept": 1, **dict.fromkeys(FILTERS, 0), "api_error": 1, "role_order": 1, "near_empty_reply": 1}
    (kept,) = read_conversations(tmp_path / "out/kept.jsonl")
    assert kept.id == "c0" and kept.audio_addresses() == (str(tmp_path / "in/a.wav"),), "the clip is where it was"
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["source"], entry["line"], entry["filter"]) for entry in dropped] == [
        ("c1", "teacher", 3, "api_error"), ("c2", "teacher", 4, "role_order"), ("c3", "teacher", 5, "near_empty_reply"),
    ]  # fmt: skip
    assert dropped[0]["reason"].startswith('turns[1]: {"error": {"message": "Rate limit')
    assert filter_file(tmp_path / "in/a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl", ["role_order"])["kept"] == 3
    with pytest.raises(SchemaError, match="is the file that is read"):
        filter_file(tmp_path / "in/a.jsonl", tmp_path / "in/../in/a.jsonl", tmp_path / "c.jsonl")


def test_the_command_line_knows_every_filter():
    from step_megatron.commands import data

    assert data.FILTERS == tuple(FILTERS)
