"""One JSON request over HTTP, with all that can go wrong on the way told apart; standard library only.

A failure is `passing` where asking again may help: 408, 409, 425, 429, 5xx, a connection that breaks, a body that is not JSON or
does not end in time. Redirects are refused, for they would carry the key to another host.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

_PASSING = {408, 409, 425, 429}
_LARGEST = 16 << 20
_CHUNK = 1 << 16


class HTTPFailure(Exception):
    """A request that brought nothing.

    Attributes:
        passing: whether the same request may succeed later.
        status: the HTTP status, None where there was none.
        wait: seconds that the server asks to wait (`Retry-After`), None where it does not.
    """

    def __init__(self, message: str, passing: bool, status: int | None = None, wait: float | None = None):
        super().__init__(message)
        self.passing, self.status, self.wait = passing, status, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args, **_kwargs):
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def post_json(url: str, body: Any, headers: dict[str, str], timeout: float) -> Any:
    """Send a JSON value and return the JSON value of the answer.

    Args:
        timeout: seconds for the whole exchange, also where the server sends a byte now and then.

    Raises:
        HTTPFailure: see the module.
    """
    deadline = time.monotonic() + timeout
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            received = _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _status_failure(error) from None
    except (OSError, http.client.HTTPException) as error:
        # Timeouts and refused, reset or half-closed connections; urllib's own error is an OSError.
        raise HTTPFailure(f"{type(error).__name__}: {error}", passing=True) from None
    try:
        return json.loads(received)
    except (ValueError, RecursionError):
        raise HTTPFailure(f"the answer is not JSON: {received[:80]!r}", passing=True) from None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    chunks, size = [], 0
    while chunk := response.read1(_CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        if size > _LARGEST:
            raise HTTPFailure(f"the answer is larger than {_LARGEST} bytes", passing=False)
        if time.monotonic() > deadline:
            raise HTTPFailure("the answer did not end in time", passing=True)
    if response.length:
        raise HTTPFailure(f"the connection was closed {response.length} bytes before the end", passing=True)
    return b"".join(chunks)


def _status_failure(error: urllib.error.HTTPError) -> HTTPFailure:
    passing = error.code in _PASSING or error.code >= 500
    try:
        said = error.read(500).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException):
        said = ""
    wait = error.headers.get("Retry-After", "")
    return HTTPFailure(f"HTTP {error.code}: {said or error.reason}", passing, error.code, float(wait) if wait.isdigit() else None)
