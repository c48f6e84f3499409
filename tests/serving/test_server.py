"""The OpenAI-compatible endpoint over loopback: audio parts, streaming, counts, errors, and who is answered together."""

import base64
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from evaluation.conftest import tokenizer_dir, trained  # noqa: F401

from step_megatron.evaluation.load import loaded_run
from step_megatron.evaluation.scoring import split_reply
from step_megatron.serving.protocol import Choice, RequestError, parse
from step_megatron.serving.server import serving

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(trained):  # noqa: F811
    with loaded_run(trained.run) as run, serving(run, "tones") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def call(server, body, path=PATH, method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=600)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, None if method == "GET" else data)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def question(clip: bytes | None, text: str, **more) -> dict:
    part = (
        []
        if clip is None
        else [{"type": "input_audio", "input_audio": {"data": base64.b64encode(clip).decode(), "format": "wav"}}]
    )
    return {
        "messages": [{"role": "user", "content": [*part, {"type": "text", "text": text}]}],
        "max_tokens": 8,
        "seed": 3,
        **more,
    }


def test_an_audio_question_is_answered_as_by_the_run_itself(server, trained):  # noqa: F811
    clip = (trained.data / "0.wav").read_bytes()
    status, text = call(server, question(clip, "How high?", temperature=0))
    answer = json.loads(text)
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "tones"
    from step_megatron.data.schema import Audio, Conversation, Text, Turn

    conversation = Conversation("x", "x", (Turn("human", (Audio("clip"), Text("How high?"))),))
    prompt = server.run.prompt(conversation, {"clip": server.run.encode_bytes(clip, "clip")})
    assert answer["usage"] == {
        "prompt_tokens": len(prompt.tokens),
        "completion_tokens": 8,
        "total_tokens": len(prompt.tokens) + 8,
    }
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] or choice["message"]["reasoning_content"]


def test_streamed_pieces_add_up_to_the_whole_answer(server):
    body = question(None, "Hello?", temperature=1.0, n=2)
    whole = json.loads(call(server, body)[1])
    status, text = call(server, body | {"stream": True})
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert status == 200 and events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        for name in ("content", "reasoning_content"):
            assert "".join(c["delta"].get(name, "") for c in mine) == choice["message"][name]
        assert mine[0]["delta"] == {"role": "assistant"} and mine[-1]["finish_reason"] == choice["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"], "each choice has a seed of its own"


def test_requests_at_the_same_time_are_answered_as_one_by_one(server):
    bodies = [question(None, "How are you?" * (i + 1), temperature=1.0, seed=i) for i in range(5)]
    alone = [json.loads(call(server, body)[1])["choices"] for body in bodies]
    with ThreadPoolExecutor(5) as pool:
        together = [json.loads(text)["choices"] for _, text in pool.map(lambda body: call(server, body), bodies)]
    assert together == alone


def test_models_and_what_is_not_there(server):
    assert json.loads(call(server, b"", "/v1/models", "GET")[1])["data"][0]["id"] == "tones"
    for path, method in (("/v1/nothing", "GET"), ("/v1/embeddings", "POST")):
        status, text = call(server, {}, path, method)
        assert status == 404 and json.loads(text)["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "not JSON"),
        ({}, 400, "messages", "at least one message"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": []}, 400, "tools", "not supported"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "must be one of"),
        (question(None, "x", temperature=-1), 400, "temperature", "must be 0"),
        (question(None, "x", max_tokens=True), 400, "max_tokens", "whole number"),
        (question(None, "x", n=0), 400, "n", "from 1 to"),
        (question(b"RIFF nothing", "x"), 400, "messages", "audio"),
        (question(None, "x" * 600), 400, "messages", "outgrow"),
    ],
)
def test_errors_are_openais(server, body, status, param, message):
    got, text = call(server, body)
    error = json.loads(text)["error"]
    assert (got, error["param"]) == (status, param) and message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_request_says_all_that_a_sampling_needs():
    request = parse(
        {
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "top_k": 4,
            "max_completion_tokens": 9,
        },
        (7,),
        100,
    )
    assert [turn.role for turn in request.conversation.turns] == ["system", "human"]
    assert (request.sampling.top_k, request.sampling.max_new_tokens, request.sampling.stop_ids) == (4, 9, (7,))
    with pytest.raises(RequestError, match="base64"):
        parse({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "§"}}]}]}, (), 1)


@pytest.mark.parametrize(
    "text", ["a < b </think> the answer", "never ends </thin", "\n</think>\n\n x  y \n", "", "</think>", "é</think>ü"]
)
def test_what_was_streamed_is_never_taken_back(text):
    data = text.encode()
    choice, told = Choice(lambda ids: bytes(ids).decode(errors="replace")), {"reasoning_content": "", "content": ""}
    for count in range(len(data) + 1):
        for name, more in choice.update(list(data[:count]), final=count == len(data)).items():
            told[name] += more
    whole = split_reply(text)
    assert told == {"reasoning_content": whole.reasoning, "content": whole.answer or ""}
