"""The exception by which a file says that it holds no adapter that can be read."""

from __future__ import annotations


class NotAnAdapter(Exception):
    """A file is no readable adapter.

    outcome: one word of the index (``unreadable``, ``embedding``, ``checkpoint``, ``pickle``, …).
    reason: one sentence for people: what it is, and what to do where something can be done.
    """

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason

    def __reduce__(self) -> tuple[type[NotAnAdapter], tuple[str, str]]:
        return type(self), (self.outcome, self.reason)
