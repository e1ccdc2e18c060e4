"""What a long fit has done so far, in a file beside its result."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: Seconds between two states that are kept.
EVERY = 20.0


class Checkpoint:
    """Sums of Gram matrices and how many tiles of components are written.

    A state of another fingerprint, or one that cannot be read, counts as none. fingerprint: what
    the numbers are a function of (:class:`lorafind.features.matrix.Matrix`).
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self._kept = time.monotonic()
        self._state: dict[str, np.ndarray] = {}
        try:
            with np.load(path, allow_pickle=False) as state:
                found = {name: state[name] for name in state.files}
        except FileNotFoundError:
            return
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            # A state that was cut off while it was written is worth nothing.
            return
        if str(found.pop("fingerprint", "")) == fingerprint:
            self._state = found

    def load(self, group: str) -> tuple[int, np.ndarray] | None:
        """(tiles summed, their sum), None where nothing is kept."""
        if f"done/{group}" not in self._state:
            return None
        return int(self._state[f"done/{group}"]), self._state[f"gram/{group}"]

    def save(self, group: str, done: int, total: np.ndarray, last: bool) -> None:
        """Keep the sum of some tiles, at most every EVERY seconds, and the last always."""
        self._state[f"done/{group}"] = np.array(done)
        self._state[f"gram/{group}"] = total
        if last or time.monotonic() - self._kept > EVERY:
            self._keep()

    def written(self, facts: Mapping[str, Any]) -> int:
        """How many tiles of components of a basis with these facts are in its unfinished file."""
        if str(self._state.get("facts")) != json.dumps(facts, sort_keys=True):
            return 0
        return int(self._state["written"])

    def wrote(self, facts: Mapping[str, Any], done: int, always: bool = False) -> None:
        """So many tiles of components are in the file; kept now and then, or ``always``."""
        if always or time.monotonic() - self._kept > EVERY:
            self._state["facts"] = np.array(json.dumps(facts, sort_keys=True))
            self._state["written"] = np.array(done)
            self._keep()

    def _keep(self) -> None:
        state: dict[str, Any] = {"fingerprint": np.array(self.fingerprint), **self._state}
        part = self.path.with_name(self.path.name + ".new")
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **state)
        os.replace(part, self.path)
        self._kept = time.monotonic()

    def remove(self) -> None:
        """The work is done."""
        self.path.unlink(missing_ok=True)
