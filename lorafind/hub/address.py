"""How a basis on the Hub is named."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lorafind.bases.problem import BasisProblem

PREFIX = "hf:"
_ADDRESS = re.compile(r"([\w.-]+/[\w.-]+)(?:@(\w[\w./-]*))?", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Address:
    """A repository of the Hub; revision: branch, tag or commit, empty for the main branch."""

    repository: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}{f'@{self.revision}' if self.revision else ''}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a full commit, which names the same bytes for ever."""
        return _COMMIT.fullmatch(self.revision) is not None

    def at(self, revision: str) -> Address:
        """The same repository at another revision."""
        return Address(self.repository, revision)


def parse(name: str) -> Address:
    """``hf:owner/name`` or ``hf:owner/name@revision``. Raises BasisProblem for anything else."""
    found = _ADDRESS.fullmatch(name.removeprefix(PREFIX))
    if found is None or ".." in name:
        raise BasisProblem(
            f"{name} names no repository: write hf:owner/name or hf:owner/name@revision."
        )
    return Address(found[1], found[2] or "")


@dataclass(frozen=True, slots=True)
class Found:
    """A basis file that is here. name: its path, or ``hf:owner/name@commit``."""

    path: Path
    name: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return self.name
