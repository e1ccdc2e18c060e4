"""A published basis and a user who asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lorafind.bases.problem import BasisProblem
from lorafind.hub import cache
from lorafind.hub import names as hub
from lorafind.hub.address import Found
from lorafind.index.progress import Silent
from tests.hub.hub_server import HubServer

NAME = "alice/wild"
#: How the storage is asked for a large file.
STORAGE = r"GET /[0-9a-f]{64}$"


@dataclass
class Net:
    """A Hub with one published basis, and a user with an empty cache and no token."""

    server: HubServer
    file: Path
    commit: str

    @property
    def host(self) -> str:
        return self.server.url.partition("://")[2]

    @property
    def data(self) -> bytes:
        return self.file.read_bytes()

    @property
    def served(self) -> int:
        """Bytes of the basis that went over the line."""
        return sum(request.sent for request in self.server.asked(STORAGE))

    def resolve(self, name: str = f"hf:{NAME}", **options: object) -> Found:
        return hub.resolve(name, endpoint=self.server.url, **options)  # type: ignore[arg-type]

    def refused(self, name: str = f"hf:{NAME}", **options: object) -> str:
        """The sentence of a basis that cannot be had; the cache does not pretend to have it."""
        with pytest.raises(BasisProblem) as problem:
            self.resolve(name, **options)
        assert not list(cache.everything())
        return str(problem.value)


@dataclass
class Counted(Silent):
    """Progress that is written down."""

    def __post_init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.done = 0

    def stage(self, title: str, files: int, size: int) -> None:
        self.stages.append((title, files, size))

    def advance(self, files: int, size: int) -> None:
        self.done += files
