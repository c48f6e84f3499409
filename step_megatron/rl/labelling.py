"""Blind labelling in a browser: a page on this machine that shows pairs of replies and writes preference records.

    step-megatron label RUN_OR_FILE --out labelled.jsonl

Which reply is A is drawn from the record's id, and the page is told nothing else, so whoever labels cannot know whose a reply is.
Each verdict is appended, validated, as soon as it is given; started again, the page goes on with what is not labelled yet. The
server listens on loopback alone, answers only who has the token that it prints, and to no other host name (a foreign page could
otherwise be made to resolve to this machine).
"""

import dataclasses
import json
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from step_megatron.audio.errors import AudioError
from step_megatron.data.preferences import (
    Preference,
    Verdict,
    moved,
    parse_preference,
    preference_record,
    read_preferences,
)
from step_megatron.data.schema import Audio, SchemaError
from step_megatron.rl.judge.scale import Scale
from step_megatron.runtime.seeds import derive

PAGE = Path(__file__).with_name("label_page.html")
RUN_PREFERENCES = "preferences.jsonl"
_LARGEST_BODY = 1 << 20
# What the page asks to call the replies; a lone "A" is an article.
_NAMES = re.compile(r"\breply ([AB])\b", re.IGNORECASE)


class Labelling:
    """The pairs, what has been said about them, and the file that it goes to; safe in several threads.

    Args:
        source: a file of records, or a run's directory that holds `preferences.jsonl`.
        out: JSONL that labelled records are appended to.
        scale: of the verdicts.
        labeller: written into `meta.labeller` of each record.

    Raises:
        SchemaError: a file cannot be used.
    """

    def __init__(self, source: Path, out: Path, scale: Scale, labeller: str = ""):
        self.file = source / RUN_PREFERENCES if source.is_dir() else source
        self.out, self.scale, self.labeller = out, scale, labeller
        self.records = {record.id: record for record in read_preferences(self.file)}
        done = {record.id for record in read_preferences(out)} if out.is_file() and out.stat().st_size else set()
        self.open = deque(name for name in self.records if name not in done)
        self.clips = sorted({item.address for record in self.records.values() for item in _audio(record)})
        self._lock = threading.Lock()

    def next(self) -> dict[str, Any]:
        """Progress, and the pair to show: texts and numbers of clips, and nothing that says which reply is whose."""
        with self._lock:
            pair = self._shown(self.records[self.open[0]]) if self.open else None
            return {"done": len(self.records) - len(self.open), "all": len(self.records), "pair": pair}

    def skip(self, name: str) -> None:
        """Put a pair behind the others."""
        with self._lock:
            self.open.remove(self._open(name))
            self.open.append(name)

    def verdict(self, name: str, rubric: list[int], overall: int, reasoning: str) -> None:
        """Write down a verdict on the pair as shown: levels above zero are for A.

        Raises:
            SchemaError, ValueError: it is none.
        """
        with self._lock:
            record = self.records[self._open(name)]
            if any(level not in self.scale.values for level in (*rubric, overall)):
                raise ValueError(f"a level is one of {', '.join(map(str, self.scale.values))}")
            verdict = Verdict(tuple(rubric), overall)
            swapped = _is_swapped(name)
            first, second = ("{reference}", "{response}") if swapped else ("{response}", "{reference}")
            named = {"a": first, "b": second}
            labelled = dataclasses.replace(
                record,
                history=moved(record.history, self.file.parent.resolve(), self.out.parent.resolve()),
                verdict=verdict.swapped() if swapped else verdict,
                reasoning=_NAMES.sub(lambda name: named[name[1].lower()], reasoning.strip()) or None,
                meta=record.meta | ({"labeller": self.labeller} if self.labeller else {}),
            )
            line = json.dumps(preference_record(labelled), ensure_ascii=False)
            parse_preference(line, str(self.out))
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self.open.remove(name)

    def _open(self, name: str) -> str:
        if name not in self.open:
            raise ValueError(f"{name!r} is not waiting for a verdict")
        return name

    def _shown(self, record: Preference) -> dict[str, Any]:
        replies = (record.reference, record.response) if _is_swapped(record.id) else (record.response, record.reference)
        history = [
            {
                "role": turn.role,
                "content": [
                    {"clip": self.clips.index(item.address)} if isinstance(item, Audio) else {"text": item.text}
                    for item in turn.content
                ],
            }
            for turn in record.history
        ]
        meanings = self.scale.describe().replace("reply 1", "A").replace("reply 2", "B").split("\n")
        levels = [[int(level), text] for level, _, text in (line.partition(": ") for line in meanings)]
        return {
            "id": record.id, "history": history, "first": replies[0], "second": replies[1], "rubric": list(record.rubric),
            "levels": levels,
        }  # fmt: skip


def serve(labelling: Labelling, wav: Callable[[str], bytes], port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server that is ready to `serve_forever`, and the address of its page.

    Args:
        wav: address of a clip -> its WAV bytes, or an AudioError.
        port: on loopback; 0 takes a free one.
    """
    server = _Server(("127.0.0.1", port), _Handler)
    server.labelling, server.wav, server.token = labelling, wav, secrets.token_urlsafe(16)
    return server, f"http://127.0.0.1:{server.server_port}/?token={server.token}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    labelling: Labelling
    wav: Callable[[str], bytes]
    token: str


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._allowed():
            self._json(403, {"error": "open the address that the command has printed"})
        elif path == "/":
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/next":
            self._json(200, self.server.labelling.next())
        elif clip := re.fullmatch(r"/clip/(\d{1,9})", path):
            self._clip(int(clip[1]))
        else:
            self._json(404, {"error": "there is no such page"})

    def do_POST(self) -> None:
        # A form of another page can neither set this header nor send JSON without being asked for first.
        if not self._allowed() or self.headers.get("X-Token") != self.server.token:
            return self._json(403, {"error": "open the address that the command has printed"})
        labelling = self.server.labelling
        try:
            length = int(self.headers.get("Content-Length", 0))
            if length > _LARGEST_BODY:
                raise ValueError("the message is too long")
            said = json.loads(self.rfile.read(length))
            if self.path == "/verdict":
                labelling.verdict(said["id"], [*said["rubric"]], said["overall"], str(said.get("reasoning", "")))
            elif self.path == "/skip":
                labelling.skip(said["id"])
            else:
                return self._json(404, {"error": "there is no such page"})
        except (SchemaError, ValueError, KeyError, TypeError) as error:
            return self._json(400, {"error": str(error)})
        return self._json(200, labelling.next())

    def _allowed(self) -> bool:
        host = self.headers.get("Host", "").rpartition(":")[0]
        given = self.headers.get("X-Token") or parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        return host in ("127.0.0.1", "localhost") and secrets.compare_digest(given.encode(), self.server.token.encode())

    def _clip(self, number: int) -> None:
        clips = self.server.labelling.clips
        try:
            self._send(200, "audio/wav", self.server.wav(clips[number]))
        except (IndexError, AudioError) as error:
            self._json(404, {"error": str(error)})

    def _json(self, status: int, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args) -> None:
        """Nothing: addresses hold the token."""


def _audio(record: Preference) -> list[Audio]:
    return [item for turn in record.history for item in turn.content if isinstance(item, Audio)]


def _is_swapped(name: str) -> bool:
    """Whether the reference is A; drawn anew by nobody, so that a page that is opened again shows the same."""
    return bool(derive(0, "label", name) & 1)
