"""The exceptions of the audio rooms; the main one is a clip that cannot be used, with a kind that quarantine reports count by."""

from typing import Literal

from step_megatron.errors import UserError

ErrorKind = Literal["missing", "unreadable", "empty", "corrupt", "truncated", "silent", "too-short", "too-long"]


class AudioError(UserError):
    """A clip that cannot be used.

    Attributes:
        kind: the class of the failure; reports count by it.
        detail: what exactly is wrong, for a human.
    """

    def __init__(self, kind: ErrorKind, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class NotIndexed(UserError, KeyError):
    """A clip that the audio index does not hold; the message says whether it is quarantined (and why) or was never validated."""


class QuarantineLimitExceeded(UserError, RuntimeError):
    """More clips are unusable than `data.quarantine_limit` allows; the message has the counts and the commonest reasons."""
