"""Downloads: resumed, retried, checked before use; the mirror comes from the environment or from apt."""

import hashlib
import http.server
import threading

import pytest

from step_megatron.data.fetch import download as download_module
from step_megatron.data.fetch import mirror
from step_megatron.data.fetch.download import DownloadError, download
from step_megatron.data.fetch.mirror import MirrorError, candidates

CONTENT = bytes(range(256)) * 4096
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path but /missing; `behaviour` (one entry a request) breaks single answers."""

    def __init__(self, content: bytes = CONTENT):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.behaviour, self.ranges = content, [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        behaviour = self.server.behaviour.pop(0) if self.server.behaviour else "whole"
        content = self.server.content
        if "missing" in self.path:
            return self.send_error(404)
        if behaviour == "busy":
            return self.send_error(503)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and behaviour != "no-range" else 0
        if start >= len(content):
            return self.send_error(416)
        if behaviour == "cut chunk":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\nonly this much")
            return self.connection.close()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: len(body) // 3] if behaviour == "cut" else body)
        if behaviour == "cut":
            self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    each = Server()
    yield each
    each.shutdown()
    each.server_close()


def get(server, target, digest=DIGEST, path="/f", size=SIZE):
    return download([server.url + path], target, size, digest, wait_seconds=0.01)


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.behaviour = ["cut", "cut", "whole"]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    third = len(CONTENT) // 3
    assert server.ranges == [None, f"bytes={third}-", f"bytes={third + (len(CONTENT) - third) // 3}-"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_part_of_a_killed_process_is_used(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_finished_part_needs_no_request_and_a_finished_file_neither(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    get(server, tmp_path / "f")
    get(server, tmp_path / "f")
    assert server.ranges == []


def test_a_server_without_ranges_starts_over(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    server.behaviour = ["no-range"]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_a_part_of_another_version_is_thrown_away_once(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"old" * 1000)
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges == ["bytes=3000-", None]


def test_a_part_longer_than_the_file_starts_over(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.behaviour = ["busy", "busy", "whole"]
    get(server, tmp_path / "f")
    assert len(server.ranges) == 3


def test_an_answer_that_is_not_whole_http_is_asked_for_again_and_elsewhere(server, tmp_path):
    server.behaviour = ["cut chunk", "whole"]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    server.behaviour = ["cut chunk"] * download_module._ATTEMPTS
    urls = [server.url + "/f", server.url + "/g"]
    assert download(urls, tmp_path / "g", SIZE, DIGEST, wait_seconds=0.01).read_bytes() == CONTENT


def test_another_file_is_never_left_in_place(server, tmp_path):
    with pytest.raises(DownloadError, match="sha256 is .*pinned is"):
        get(server, tmp_path / "f", digest="0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_longer_file_is_refused_before_it_fills_the_disk(server, tmp_path):
    with pytest.raises(DownloadError, match="more than the pinned 100 bytes"):
        get(server, tmp_path / "f", size=100)


def test_a_damaged_file_in_place_is_downloaded_again(server, tmp_path):
    (tmp_path / "f").write_bytes(b"damaged")
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_a_missing_file_says_what_to_do_after_every_mirror_was_asked(server, tmp_path):
    urls = [server.url + "/missing", server.url + "/missing-too"]
    with pytest.raises(DownloadError) as caught:
        download(urls, tmp_path / "f", 1, DIGEST, wait_seconds=0.01)
    message = str(caught.value)
    assert all(text in message for text in (*urls, "404", mirror.VARIABLE, DIGEST, str(tmp_path / "f")))
    assert len(server.ranges) == 2, "a 404 is not worth a second request"


def test_the_next_mirror_serves_what_the_first_lacks(server, tmp_path):
    download([server.url + "/missing", server.url + "/f"], tmp_path / "f", len(CONTENT), DIGEST, wait_seconds=0.01)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_the_environment_names_the_mirror(monkeypatch, tmp_path):
    monkeypatch.setenv(mirror.VARIABLE, "http://one.example/debian/ http://two.example/d")
    assert candidates(tmp_path) == ["http://one.example/debian", "http://two.example/d"]


def test_apt_names_the_mirror(monkeypatch, tmp_path):
    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented.example/debian x main\n"
        "deb-src http://source.example/debian x main\n"
        "deb [arch=amd64 signed-by=/k] https://vendor.example/repo stable main\n"
        "deb cdrom:[disc]/ x main\n"
    )
    (tmp_path / "sources.list.d" / "a.sources").write_text(
        "Types: deb deb-src\n# a comment inside\nURIs: http://first.example/debian\n http://second.example/debian/\n"
        "Suites: x\nComponents: main\n\nTypes: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: x\n"
    )
    (tmp_path / "sources.list.d" / "ignored.save").write_text("deb http://saved.example/debian x main\n")
    assert candidates(tmp_path) == ["http://first.example/debian", "http://second.example/debian", "https://vendor.example/repo"]


def test_no_mirror_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    with pytest.raises(MirrorError, match=mirror.VARIABLE):
        candidates(tmp_path)
