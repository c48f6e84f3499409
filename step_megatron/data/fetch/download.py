"""Download a pinned file over HTTP: resumes, retries, shows progress, and never leaves an unchecked file in place.

A file is written as `NAME.part` and renamed to `NAME` only when its SHA-256 is the pinned one, so that whatever exists under
its final name is right, even after `kill -9`.
"""

import hashlib
import http.client
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from step_megatron.errors import UserError

_BLOCK = 1 << 18
_ATTEMPTS = 5
_TIMEOUT_SECONDS = 60


class DownloadError(UserError, RuntimeError):
    """A pinned file that could not be had, with the remedy."""


class TransferMeter:
    """Prints bytes, rate and time left on stderr: one line that is rewritten on a terminal, a line every 5 s elsewhere."""

    def __init__(self, label: str, total: int, done: int = 0):
        self.label, self.total, self.done = label, total, done
        self._start, self._start_done, self._shown = time.monotonic(), done, time.monotonic()

    def add(self, count: int) -> None:
        """Count `count` more bytes."""
        self.done += count
        now = time.monotonic()
        if now - self._shown >= (0.2 if sys.stderr.isatty() else 5.0):
            self._shown = now
            self._print("\r" if sys.stderr.isatty() else "", "" if sys.stderr.isatty() else "\n")

    def finish(self) -> None:
        """Print the final state on a line of its own."""
        self._print("\r" if sys.stderr.isatty() else "", "\n")

    def _print(self, before: str, after: str) -> None:
        rate = (self.done - self._start_done) / max(time.monotonic() - self._start, 1e-6)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f"{left:.0f} s left" if left != float("inf") else "waiting"
        line = f"{self.label}: {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {eta}"
        print(f"{before}{line:<100}{after}", end="", file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of the file at `path`, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(urls: list[str], target: Path, size: int, sha256: str, wait_seconds: float = 1.0) -> Path:
    """Have the pinned file at `target`; does nothing when it is already there.

    Args:
        urls: the same file on one or more mirrors, tried in order.
        target: final path; `target` + ".part" holds an unfinished download and is continued with an HTTP range.
        size: expected bytes.
        sha256: expected digest.
        wait_seconds: first pause between attempts; it doubles each time.

    Raises:
        DownloadError: every mirror fails, or what they serve is not the pinned file.
    """
    if target.exists():
        if sha256_of(target) == sha256:
            return target
        print(f"{target.name} is not the pinned file; downloading it again", file=sys.stderr)
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    reasons = []
    for url in urls:
        try:
            _download_from(url, part, size, sha256, wait_seconds)
        except (DownloadError, OSError, http.client.HTTPException) as error:
            reasons.append(f"  {url}: {error}")
            continue
        part.rename(target)
        return target
    raise DownloadError(
        f"could not download {target.name}:\n" + "\n".join(reasons) + "\nA mirror drops a file when a newer version replaces it. "
        "Set STEP_DEBIAN_MIRROR to a mirror that still has it (a dated snapshot of the Debian archive keeps every version), "
        f"or put the file (sha256 {sha256}) at {target} yourself."
    )


def _download_from(url: str, part: Path, size: int, sha256: str, wait_seconds: float) -> None:
    """Fill `part` from one URL, continuing it where it stops.

    A resumed file can be the mix of two versions, so a mismatch is given one more try from the first byte.
    """
    resumed = part.exists()
    for attempt in range(_ATTEMPTS):
        try:
            _transfer(url, part, size)
            break
        except urllib.error.HTTPError as error:
            if error.code == 416:
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        if attempt == _ATTEMPTS - 1:
            raise failure
        print(f"{part.stem}: {failure}; trying again in {wait_seconds:g} s", file=sys.stderr)
        time.sleep(wait_seconds)
        wait_seconds *= 2
        resumed = part.exists()
    actual = sha256_of(part)
    if actual == sha256:
        return
    part.unlink()
    if resumed:
        return _download_from(url, part, size, sha256, wait_seconds)
    raise DownloadError(f"sha256 is {actual}, pinned is {sha256}; the file was deleted and not used")


def _transfer(url: str, part: Path, size: int) -> None:
    """One HTTP exchange that appends to `part`; OSError or HTTPException when fewer than `size` bytes come."""
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise OSError(f"asked for bytes from {start}, got {response.headers.get('Content-Range')!r}")
        if response.status != 206:
            start = 0
        meter = TransferMeter(part.stem, size, start)
        with part.open("ab" if start else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                meter.add(len(block))
                if meter.done > size:
                    raise DownloadError(f"more than the pinned {size} bytes came; this is another file")
        meter.finish()
    if meter.done < size:
        raise OSError(f"the connection ended at byte {meter.done} of {size}")
