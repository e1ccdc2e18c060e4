"""How a long run tells what it does."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a long run tells about itself."""

    def stage(self, title: str, files: int, size: int) -> None:
        """A stage begins; files and bytes (0 where they do not apply) lie ahead."""

    def advance(self, files: int, size: int) -> None:
        """So much more is done."""

    def note(self, sentence: str) -> None:
        """Something that the user should know, though nothing is wrong."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, title: str, files: int, size: int) -> None:
        """Nothing."""

    def advance(self, files: int, size: int) -> None:
        """Nothing."""

    def note(self, sentence: str) -> None:
        """Nothing."""
