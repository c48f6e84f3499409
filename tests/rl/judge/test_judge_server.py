"""The server judge against a server on loopback that fails in every way there is; keys stay secret; nothing is asked twice."""

import json
import logging
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from step_megatron.config.rl import JudgeConfig, JudgeServerConfig
from step_megatron.data.schema import Audio, Text, Turn
from step_megatron.rl.judge.cache import AnswerCache
from step_megatron.rl.judge.judging import judge_pairs
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.server import JudgeServerError, ServerJudge

KEY = "sk-secret-123"
VERDICT = 'hm</think>{"rubric": [], "overall": 2}'
PAIR = Pair("p", (Turn("human", (Audio("a.wav"), Text("What is said?"))),), "hello", "goodbye")
ONE_ORDER = JudgeConfig(orders="random")


def configured(**server) -> JudgeConfig:
    return JudgeConfig(server=JudgeServerConfig(**server))


def completion(content=VERDICT, **message) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content, **message}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request by the next of `script`, then well; counts requests and those at work at once."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bodies, self.headers, self.at_work, self.most = list(script), [], [], 0, 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # clients that left


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        with server.lock:
            server.bodies.append((self.path, body))
            server.headers.append(dict(self.headers))
            server.at_work += 1
            server.most = max(server.most, server.at_work)
            act = server.script.pop(0) if server.script else completion()
        try:
            act(self) if callable(act) else self.reply(200, act)
        finally:
            with server.lock:
                server.at_work -= 1

    # What a client makes of a redirected POST.
    do_GET = do_POST

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def judging(*script, **settings):
    """A server that follows the script, a judge that asks it, and the waits that the judge made."""
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    waits = []
    wav = settings.pop("wav", None)
    defaults = {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "judge-1", "timeout_seconds": 60.0}
    judge = ServerJudge(configured(**{**defaults, **settings}), wav, sleep=waits.append, jitter=lambda: 0.5)
    try:
        yield server, judge, waits
    finally:
        judge.close()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def reward_of(judge, pair=PAIR):
    return judge_pairs([pair], judge, ONE_ORDER, seed=1)[0].reward


def test_the_request_and_the_answer():
    with judging() as (server, judge, _):
        assert abs(reward_of(judge)) == pytest.approx(2 / 3)
        path, body = server.bodies[0]
        assert path == "/v1/chat/completions" and body["model"] == "judge-1"
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert 'human: [audio] "What is said?"' in body["messages"][1]["content"]
        assert "Authorization" not in server.headers[0]


def test_clips_are_sent_to_a_judge_that_listens():
    with judging(wav=lambda address: b"RIFF" + address.encode()) as (server, judge, _):
        reward_of(judge)
        parts = server.bodies[0][1]["messages"][1]["content"]
        assert [part["type"] for part in parts] == ["text", "input_audio", "text"]
        assert parts[1]["input_audio"] == {"data": "UklGRmEud2F2", "format": "wav"}


def test_thinking_that_a_server_gives_apart_is_put_in_front():
    plain = '{"rubric": [], "overall": 2}'
    with judging(completion(plain, reasoning_content="hm"), completion(plain, reasoning="hm"), completion(None)) as (_, judge, _):
        assert abs(reward_of(judge)) == pytest.approx(2 / 3) == abs(reward_of(judge))
        assert reward_of(judge) is not None  # asked again: an empty answer is no verdict


def close_early(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.close_connection = True


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


def status(code, body=b"no", **headers):
    return lambda handler: handler.reply(code, body, **headers)


@pytest.mark.parametrize("fault", [status(429), status(500), status(503), b"{broken", b"\xff\xfe", close_early, hang_up])
def test_what_passes_is_asked_again_with_growing_waits(fault):
    with judging(fault, fault, fault, backoff_seconds=1.0, max_backoff_seconds=3.0) as (server, judge, waits):
        assert reward_of(judge) is not None
        assert len(server.bodies) == 4 and waits == [0.5, 1.0, 1.5]


def test_a_server_may_say_how_long_to_wait():
    with judging(status(429, Retry_After="7"), status(429, Retry_After="9999"), max_backoff_seconds=60.0) as (_, judge, waits):
        assert reward_of(judge) is not None and waits == [7, 60]


def test_what_does_not_pass_masks_the_sample(caplog):
    with judging(*[status(500, b"overloaded")] * 9, retries=2) as (server, judge, _), caplog.at_level(logging.WARNING):
        (judgment,) = judge_pairs([PAIR], judge, ONE_ORDER, seed=1)
        assert judgment.reward is None and judgment.failures == ("unanswered",) and len(server.bodies) == 3
        assert "HTTP 500: overloaded" in caplog.text


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"choices": []}', completion(3), completion("x", reasoning=[1]), status(400)])
def test_an_answer_of_another_kind_masks_the_sample_at_once(answer):
    with judging(answer) as (server, judge, _):
        assert reward_of(judge) is None and len(server.bodies) == 1


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.02)


def stay_silent(handler):
    time.sleep(2)


@pytest.mark.parametrize("slow", [drip, stay_silent])
def test_a_slow_answer_is_given_up(slow):
    with judging(slow, timeout_seconds=0.3, retries=0) as (_, judge, _):
        assert reward_of(judge) is None


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_the_user_must_mend_ends_the_run(code, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judging(status(code, f"bad key {KEY}".encode()), api_key_env="JUDGE_KEY") as (server, judge, _):
        with pytest.raises(JudgeServerError, match=rf"HTTP {code}: bad key \[key\]") as error:
            reward_of(judge)
        assert KEY not in str(error.value)
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_the_key_is_neither_logged_nor_kept_nor_sent_elsewhere(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judging() as (other, _, _):
        elsewhere = status(302, b"moved", Location=f"http://127.0.0.1:{other.server_port}/v1/chat/completions")
        script = (elsewhere, status(400, KEY.encode()), completion())
        with judging(*script, api_key_env="JUDGE_KEY", cache_dir=str(tmp_path)) as (_, judge, _), caplog.at_level(logging.DEBUG):
            assert reward_of(judge) is None and reward_of(judge) is None and reward_of(judge) is not None
            assert KEY not in repr(judge.__dict__)
        assert not other.bodies
    assert KEY not in caplog.text and "[key]" in caplog.text and "HTTP 302" in caplog.text
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "file:///etc/passwd"}, "url='file"),
        ({"url": ""}, "give both"),
        ({"model": ""}, "give both"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set"),
    ],
)
def test_a_server_that_cannot_be_asked_is_refused_at_the_start(settings, message):
    with pytest.raises(JudgeServerError, match=message):
        ServerJudge(configured(**{"url": "http://127.0.0.1:1/v1", "model": "m", **settings}))


def test_a_key_that_fits_no_header_is_refused_without_being_shown(monkeypatch):
    for spoilt in (f"{KEY}\nX-Other: 1", f"{KEY}é"):
        monkeypatch.setenv("JUDGE_KEY", spoilt)
        with pytest.raises(JudgeServerError, match="JUDGE_KEY holds what no key has") as error:
            ServerJudge(configured(url="http://127.0.0.1:1/v1", model="m", api_key_env="JUDGE_KEY"))
        assert KEY not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with judging(api_key_env="JUDGE_KEY") as (server, judge, _):
        assert reward_of(judge) is not None and server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_no_more_requests_than_allowed_are_on_the_way_from_however_many_threads():
    gate = threading.Barrier(3, timeout=60)

    def meet(handler):
        gate.wait()  # passes only where three are at work at once
        handler.reply(200, completion())

    with judging(*[meet] * 12, concurrency=3) as (server, judge, _):
        results = []
        asking = [
            threading.Thread(
                target=lambda k=k: results.extend(
                    judge_pairs([Pair(f"{k}{i}", (), "a", "b") for i in range(3)], judge, JudgeConfig(), seed=1)
                )
            )
            for k in range(2)
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert len(results) == 6 and server.most == 3


def test_answers_are_kept_by_question_and_model(tmp_path):
    cache = str(tmp_path / "answers")
    with judging(cache_dir=cache) as (server, judge, _):
        first = reward_of(judge)
        assert reward_of(judge) == first and len(server.bodies) == 1
        # A line cut short by a crash, and another writer's file.
        (tmp_path / "answers" / "answers-other-1.jsonl").write_text('{"key": "x", "text": "y"}\n{"key": "z", "te')
        again = ServerJudge(judge.judge)
        assert reward_of(again) == first and len(server.bodies) == 1
        again.close()
        reward_of(judge, Pair("p", PAIR.history, "hello!", "goodbye"))
        assert len(server.bodies) == 2
        other = ServerJudge(configured(**{**judge.settings.__dict__, "model": "judge-2"}))
        reward_of(other)
        other.close()
        assert len(server.bodies) == 3
    assert AnswerCache(cache).get("x") == "y" and AnswerCache(cache).get("z") is None


def test_an_answer_that_is_no_verdict_is_kept_too_so_a_resumed_run_goes_the_same_way(tmp_path):
    with judging(completion("no idea"), cache_dir=str(tmp_path)) as (server, judge, _):
        (first,) = judge_pairs([PAIR], judge, ONE_ORDER, seed=1)
        (second,) = judge_pairs([PAIR], judge, ONE_ORDER, seed=1)
        assert first == second and first.failures == ("unfinished",) and len(server.bodies) == 2
