"""HTTP for chat completions on the standard library: `/v1/chat/completions` (also streamed), `/v1/models`, `/health`.

Each connection has a thread; all share one engine, so requests are decoded together. Bound to the loopback address unless told
otherwise: there is no key and no encryption.
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from step_megatron.audio.errors import AudioError
from step_megatron.evaluation.load import TrainedRun, loaded_run
from step_megatron.generation.request import Generation, Prompt
from step_megatron.runtime.progress import get_logger
from step_megatron.serving.protocol import Choice, Request, RequestError, parse, usage
from step_megatron.serving.worker import Progress, Ticket, Worker

logger = get_logger(__name__)

_MOST_BYTES = 64 * 2**20
_LONGEST_REPLY = 1024


def serve(run_dir: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a run's newest checkpoint until interrupted.

    Raises:
        FileNotFoundError, ValueError: see `evaluation.load.loaded_run`.
        OSError: the port is taken.
    """
    with loaded_run(run_dir) as run, serving(run, run_dir.name, host, port) as server:
        print(f"serving {run_dir} at http://{host}:{server.server_address[1]}/v1 (Ctrl-C ends)", flush=True)
        server.serve_forever()


@contextmanager
def serving(run: TrainedRun, name: str, host: str = "127.0.0.1", port: int = 0) -> Iterator["Server"]:
    """A server that listens (`serve_forever` answers); port 0 is any that is free."""
    with Worker(run.engine, torch.get_num_threads()) as worker:
        server = Server((host, port), run, worker, name)
        try:
            yield server
        finally:
            server.server_close()


class Server(ThreadingHTTPServer):
    """The listening socket, and what every connection needs."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], run: TrainedRun, worker: Worker, name: str):
        super().__init__(address, _Handler)
        self.run, self.worker, self.name = run, worker, name
        self.created = int(time.time())

    def submit(self, request: Request) -> Ticket:
        """Hand a request to the engine."""
        first = request.sampling
        samplings = [dataclasses.replace(first, seed=first.seed + i) for i in range(request.samples)]
        return self.worker.submit(lambda: self._prompt(request), samplings)

    def decode(self, ids: list[int], reason: str | None) -> str:
        """Text of a sample, from inside `<think>` on."""
        return self.run.rendering.text(Generation(ids, finish_reason=reason or "length"))

    def _prompt(self, request: Request) -> Prompt:
        try:
            encoded = {name: self.run.encode_bytes(data, name) for name, data in request.clips.items()}
        except AudioError as error:
            raise RequestError(f"audio: {error}", "messages") from error
        return self.run.prompt(request.conversation, encoded)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """`/v1/models`, `/v1/models/NAME` and `/health`."""
        model = {"id": self.server.name, "object": "model", "created": self.server.created, "owned_by": "step-megatron"}
        known = {"/v1/models": {"object": "list", "data": [model]}, f"/v1/models/{self.server.name}": model, "/health": {}}
        if self.path in known:
            self._send(200, known[self.path])
        else:
            self._refuse(RequestError(f"no such path: {self.path}", status=404, code="not_found"))

    def do_POST(self) -> None:
        """`/v1/chat/completions`."""
        try:
            body = self._body()
            if self.path != "/v1/chat/completions":
                raise RequestError(f"no such path: {self.path}", status=404, code="not_found")
            request = parse(body, self.server.run.rendering.stop_ids, _LONGEST_REPLY)
            ticket = self.server.submit(request)
        except RequestError as error:
            self._refuse(error)
            return
        try:
            (self._stream if request.stream else self._answer)(request, ticket)
        except (BrokenPipeError, ConnectionResetError):
            # The client has gone; so does its request.
            ticket.abandoned = True
            self.close_connection = True

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MOST_BYTES:
            self.close_connection = True
            status = 413 if length.isdigit() else 411
            raise RequestError(f"a body of at most {_MOST_BYTES} bytes needs its Content-Length", status=status)
        try:
            return json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {error}") from error

    def _answer(self, request: Request, ticket: Ticket) -> None:
        try:
            *_, last = ticket
        except Exception as error:
            self._refuse(_as_request_error(error))
            return
        choices = []
        for index, (ids, reason) in enumerate(zip(last.tokens, last.reasons, strict=True)):
            choice = Choice(lambda ids, reason=reason: self.server.decode(ids, reason))
            choice.update(ids, final=True)
            choices.append({"index": index, "message": choice.message(), "finish_reason": reason, "logprobs": None})
        self._send(200, self._head("chat.completion") | {"choices": choices, "usage": _usage(last)})

    def _stream(self, request: Request, ticket: Ticket) -> None:
        """Server-sent events: a chunk for what is new of a sample, one that ends it, the counts, and `[DONE]`."""
        heard = iter(ticket)
        try:
            last = next(heard)
        except Exception as error:
            self._refuse(_as_request_error(error))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = self._head("chat.completion.chunk")
        told: list[tuple[Choice, list]] = [(Choice(str), []) for _ in last.tokens]
        for index in range(len(told)):
            self._event(head | {"choices": [{"index": index, "delta": {"role": "assistant"}, "finish_reason": None}]})
        try:
            while True:
                for index, ((choice, ended), ids, reason) in enumerate(zip(told, last.tokens, last.reasons, strict=True)):
                    if ended:
                        continue
                    choice.decode = lambda ids, reason=reason: self.server.decode(ids, reason)
                    delta = choice.update(ids, final=reason is not None)
                    if delta or reason:
                        self._event(head | {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]})
                    ended += [reason] if reason else []
                if last.done:
                    break
                last = next(heard)
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            self._event(_as_request_error(error).body())
            return
        self._event(head | {"choices": [], "usage": _usage(last)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.server.name}

    def _event(self, tree: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(tree)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, error: RequestError) -> None:
        self._send(error.status, error.body())

    def _send(self, status: int, tree: dict[str, Any]) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """To the log, not to standard error past it."""
        logger.debug(format, *arguments)


def _usage(progress: Progress) -> dict[str, int]:
    return usage(progress.prompt_tokens, sum(map(len, progress.tokens)))


def _as_request_error(error: Exception) -> RequestError:
    """What the engine refuses is the request's fault (too long, not audio); anything else is ours."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):
        return RequestError(str(error), "messages", code="context_length_exceeded" if "outgrow" in str(error) else None)
    logger.error("a request failed", exc_info=error)
    return RequestError("the server failed; its log says why", status=500)
