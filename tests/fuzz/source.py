"""Choices out of bytes, so that a fuzzer which mutates bytes mutates the choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads choices from the front of some bytes; when they have run out, every choice is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """The next byte."""
        at = self._at
        self._at += 1
        return self._data[at] if at < len(self._data) else 0

    def number(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        span, value, width = high - low, 0, 0
        while width < span.bit_length():
            value = value << 8 | self.byte()
            width += 8
        return low + value % (span + 1)

    def pick(self, items: Sequence[T]) -> T:
        """One of some things."""
        return items[self.number(0, len(items) - 1)]

    def seldom(self, one_in: int) -> bool:
        """True in one of so many cases; never when the bytes have run out."""
        return self.number(0, one_in - 1) == one_in - 1

    def text(self, most: int) -> str:
        """A short text of any characters."""
        length = self.number(0, most)
        piece = self._data[self._at : self._at + length]
        self._at += length
        return piece.decode("utf-8", "replace")

    @property
    def rest(self) -> bytes:
        """What has not been read."""
        return self._data[self._at :]
