"""The published bases that lorafind knows: ``registry.json``, one object per basis.

``architecture`` and ``feature``; ``repository`` (``owner/name`` on the Hub); ``revision``, a full
commit; ``sha256`` of ``basis.safetensors``, hex. The first entry of an architecture is its default.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Entry:
    """A published basis, pinned to a commit and to its bytes."""

    architecture: str
    feature: str
    repository: str
    revision: str
    sha256: str


@cache
def entries() -> tuple[Entry, ...]:
    """All of them, in the order of the file."""
    text = files("lorafind.hub").joinpath("registry.json").read_text("utf-8")
    return tuple(Entry(**fields) for fields in json.loads(text))


def default(architecture: str) -> Entry | None:
    """The basis that serves an architecture where the user has chosen none."""
    return next((entry for entry in entries() if entry.architecture == architecture), None)


def named(name: str) -> Entry | None:
    """The basis of a repository, named with its owner or, where that is enough, without."""
    found = [e for e in entries() if name in (e.repository, e.repository.partition("/")[2])]
    return found[0] if len(found) == 1 else None
