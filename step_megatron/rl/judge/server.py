"""A judge behind an OpenAI-compatible server: many requests at once, retries with growing waits, a cache on disk."""

import base64
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from step_megatron.audio.errors import AudioError
from step_megatron.config.rl import JudgeConfig
from step_megatron.data.schema import Audio, Turn
from step_megatron.data.template import THINK_END
from step_megatron.errors import UserError
from step_megatron.rl.judge.cache import AnswerCache, key_of
from step_megatron.rl.judge.http_json import HTTPFailure, post_json
from step_megatron.rl.judge.judging import Answer, Request
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)
_ROLES = {"system": "system", "human": "user"}
_USER_MUST_MEND = {401: "is the key right?", 403: "may this key use the model?", 404: "are the address and the model right?"}


class JudgeServerError(UserError, RuntimeError):
    """The server cannot be used as it is configured."""


class ServerJudge:
    """Asks `judge.server`; at most `concurrency` requests are on the way, whoever calls and from however many threads.

    Args:
        wav: address of a clip -> its WAV bytes (or an AudioError), sent along for a judge that listens; None sends `[audio]`.
        sleep, jitter: for tests: how to wait, and a number of 0 .. 1 to draw each wait with.

    Raises:
        JudgeServerError: no usable address, model or key; also from `answer`, where the server refuses the key or the model.
    """

    def __init__(
        self,
        judge: JudgeConfig,
        wav: Callable[[str], bytes] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ):
        settings = judge.server
        if not settings.url.startswith(("http://", "https://")) or not settings.model:
            raise JudgeServerError(
                f"rl.judge.server: url={settings.url!r}, model={settings.model!r}; give both, as http://host:8000/v1"
            )
        if settings.api_key_env and not os.environ.get(settings.api_key_env):
            raise JudgeServerError(f"rl.judge.server.api_key_env: the variable {settings.api_key_env} is not set; export the key")
        self.judge, self.settings, self._wav, self._sleep, self._jitter = judge, settings, wav, sleep, jitter
        # Who refuses a header says what was in it.
        if not (self._key().isascii() and self._key().isprintable()):
            raise JudgeServerError(f"rl.judge.server.api_key_env: {settings.api_key_env} holds what no key has; export it again")
        self._endpoint = settings.url.rstrip("/") + "/chat/completions"
        self._cache = AnswerCache(settings.cache_dir) if settings.cache_dir else None
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """See `judging.Judge`; safe in several threads."""
        return list(self._pool.map(self._one, requests))

    def close(self) -> None:
        """Let go of the threads; what has not been sent is not sent."""
        self._pool.shutdown(cancel_futures=True)

    def _one(self, request: Request) -> Answer:
        try:
            body = self._body(request)
            key = key_of([self._endpoint, body])
            if self._cache is not None and (known := self._cache.get(key)) is not None:
                return Answer(known)
            text = _text(self._ask(body))
        except (HTTPFailure, AudioError) as failure:
            problem = self._without_key(str(failure))
            if hint := _USER_MUST_MEND.get(getattr(failure, "status", None)):
                raise JudgeServerError(f"rl.judge.server: {self._endpoint} answers {problem}; {hint}") from None
            logger.warning("judge: no answer to %s: %s", request.prompt.id, problem)
            return Answer(None, problem)
        if self._cache is not None:
            self._cache.put(key, text)
        return Answer(text)

    def _body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "messages": [{"role": _ROLES[turn.role], "content": self._content(turn)} for turn in request.prompt.turns],
            "temperature": self.judge.temperature,
            "max_tokens": self.judge.max_tokens,
            "seed": request.seed,
        }

    def _ask(self, body: dict[str, Any]) -> Any:
        """Send, again where that may help: waits are drawn from 0 to a bound that doubles, or what the server asks for."""
        settings = self.settings
        for attempt in range(1 + settings.retries):
            try:
                return post_json(self._endpoint, body, self._headers(), settings.timeout_seconds)
            except HTTPFailure as failure:
                if not failure.passing or attempt == settings.retries:
                    raise
                bound = min(settings.max_backoff_seconds, settings.backoff_seconds * 2**attempt)
                wait = bound * self._jitter() if failure.wait is None else min(failure.wait, settings.max_backoff_seconds)
                self._sleep(wait)
        raise AssertionError("unreachable")

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key()}"} if self._key() else {}

    def _key(self) -> str:
        """Read each time, and kept nowhere."""
        return os.environ.get(self.settings.api_key_env, "").strip() if self.settings.api_key_env else ""

    def _without_key(self, text: str) -> str:
        """A server's message may repeat what it was sent."""
        return text.replace(self._key(), "[key]") if self._key() else text

    def _content(self, turn: Turn) -> str | list[dict[str, Any]]:
        """A turn's text, or its parts where clips are sent along."""
        if self._wav is None or not any(isinstance(item, Audio) for item in turn.content):
            return "".join("[audio]" if isinstance(item, Audio) else item.text for item in turn.content)
        return [self._clip(item.address) if isinstance(item, Audio) else _text_part(item.text) for item in turn.content]

    def _clip(self, address: str) -> dict[str, Any]:
        data = base64.b64encode(self._wav(address)).decode()
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _text(answer: Any) -> str:
    """What the judge wrote, from inside its thinking on: servers with a reasoning parser give the thinking apart.

    Raises:
        HTTPFailure: the value is no chat completion.
    """
    try:
        message = answer["choices"][0]["message"]
        content = message["content"]
        thinking = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise HTTPFailure(f"the answer is no chat completion: {str(answer)[:200]}", passing=False) from None
    if content is not None and not isinstance(content, str) or not isinstance(thinking, str | None):
        raise HTTPFailure(f"the answer's content is no text: {str(answer)[:200]}", passing=False)
    return f"{thinking}{THINK_END}{content or ''}" if thinking else content or ""
