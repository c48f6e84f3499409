"""Labelling by HTTP, as the page does it: blind, validated, resumable, and closed to everybody else."""

import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from step_megatron.audio.errors import AudioError
from step_megatron.data.preferences import Preference, read_preferences, write_preferences
from step_megatron.data.schema import Audio, Text, Turn
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.labelling import PAGE, Labelling, serve

HISTORY = (Turn("human", (Audio("a.wav"), Text("<b>How?</b>"))), Turn("assistant", (Text("So."),), reasoning="secret"))


@pytest.fixture
def run(tmp_path):
    records = [
        Preference(f"p{i}", "policy", HISTORY, "mine </script>", "theirs", "sft", ("Is kind.",) if i == 0 else ())
        for i in range(6)
    ]
    write_preferences(tmp_path / "preferences.jsonl", records)
    return tmp_path


def wav(address: str) -> bytes:
    if address != "a.wav":
        raise AudioError("missing", address)
    return b"RIFF"


@contextmanager
def labelling(run, out="out/labelled.jsonl"):
    """`call(method, path, body)` -> status and JSON, with the token."""
    (run / out).parent.mkdir(exist_ok=True)
    server, address = serve(Labelling(run, run / out, Scale(), "ann"), wav)
    token = address.partition("token=")[2]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def call(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        sent = {"X-Token": token, **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method, path, None if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if answer.getheader("Content-Type") == "application/json" else content

    call.token = token
    try:
        yield call
    finally:
        server.shutdown()
        server.server_close()


def test_pairs_are_shown_blind_and_verdicts_are_seen_from_the_response(run):
    shown_first = []
    with labelling(run) as call:
        status, state = call("GET", "/next")
        while state["pair"]:
            pair = state["pair"]
            assert pair.keys() == {"id", "history", "first", "second", "rubric", "levels"} and "secret" not in json.dumps(pair)
            assert pair["levels"][0] == [3, "A is much better"] and pair["levels"][-1] == [-3, "B is much better"]
            shown_first.append(pair["first"])
            # Whoever labels always prefers A.
            said = {
                "id": pair["id"],
                "rubric": [1] * len(pair["rubric"]),
                "overall": 2,
                "reasoning": "Reply A is kind, reply B is not. A pity.",
            }
            status, state = call("POST", "/verdict", said)
            assert status == 200
        assert state == {"done": 6, "all": 6, "pair": None}
    assert set(shown_first) == {"mine </script>", "theirs"}
    for record, first in zip(read_preferences(run / "out/labelled.jsonl"), shown_first, strict=True):
        response_first = first == record.response
        assert record.verdict.overall == (2 if response_first else -2) and len(record.verdict.rubric) == len(record.rubric)
        better, worse = ("{response}", "{reference}") if response_first else ("{reference}", "{response}")
        assert record.reasoning == f"{better} is kind, {worse} is not. A pity."
        assert record.meta == {"labeller": "ann"} and record.reference_from == "sft"
        assert record.history[0].content[0] == Audio("../a.wav")


def test_what_is_labelled_is_not_asked_again_and_skipped_pairs_come_last(run):
    with labelling(run) as call:
        call("POST", "/verdict", {"id": "p0", "rubric": [0], "overall": 0})
        assert call("POST", "/skip", {"id": "p1"})[1]["pair"]["id"] == "p2"
    with labelling(run) as call:
        state = call("GET", "/next")[1]
        assert state["done"] == 1 and state["pair"]["id"] == "p1"
        assert call("POST", "/verdict", {"id": "p0", "rubric": [0], "overall": 0})[0] == 400
    assert len(read_preferences(run / "out/labelled.jsonl")) == 1


@pytest.mark.parametrize(
    "said",
    [
        {"id": "p0", "rubric": [1], "overall": 4},
        {"id": "p0", "rubric": [], "overall": 1},
        {"id": "p0", "rubric": ["x"], "overall": 1},
        {"id": "p0", "rubric": [1]},
        {"id": "none", "rubric": [], "overall": 1},
        {"id": "p0", "rubric": [1], "overall": 1, "reasoning": "x </think> y"},
        [],
    ],
)
def test_what_is_no_verdict_is_refused_and_not_written(run, said):
    with labelling(run) as call:
        status, answer = call("POST", "/verdict", said)
        assert status == 400 and answer["error"]
        assert call("GET", "/next")[1]["done"] == 0
    assert not (run / "out/labelled.jsonl").exists()


def test_clips_are_played_by_number(run):
    with labelling(run) as call:
        clip = call("GET", "/next")[1]["pair"]["history"][0]["content"][0]["clip"]
        assert call("GET", f"/clip/{clip}") == (200, b"RIFF")
        assert call("GET", "/clip/99")[0] == call("GET", "/clip/../../etc/passwd")[0] == call("GET", "/etc/passwd")[0] == 404


def test_nobody_else_is_let_in(run):
    with labelling(run) as call:
        assert call("GET", "/next", X_Token="wrong")[0] == 403
        assert call("GET", "/next", Host="evil.example")[0] == 403
        assert call("POST", "/skip?token=" + call.token, {"id": "p0"}, X_Token="")[0] == 403
        assert call("GET", "/?token=" + call.token, X_Token="")[0] == 200


def test_the_page_needs_nothing_from_elsewhere_and_takes_no_text_for_html(run):
    page = PAGE.read_text()
    assert "innerHTML" not in page and "http:" not in page and "https:" not in page and 'src="' not in page
    with labelling(run) as call:
        assert call("GET", "/")[1] == page.encode()
