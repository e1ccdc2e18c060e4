"""The undo log: what is about to be done, on the drive before it is done.

One file per run in ``<index>.undo/``, JSON lines. First the run: version, plan, time. Then for
every file one record with all its steps, synced before the first of them, and one when they are
done or undone. A line that was cut by a crash was never acted on, and is passed over.

Every path that is written during an act is in its record, so that whoever reads the log can tell
from the disk alone how far the act came (:mod:`lorafind.clean.undo`).
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorafind.clean.moves import sync_folder
from lorafind.clean.problem import CleanProblem

VERSION = 1


@dataclass(frozen=True)
class Step:
    """One file that changes its place, or becomes a link.

    source, target: of a move; for a link the path and its keeper. token: names part files. sha256,
    bytes, mtime_ns, mode: of the source. info, text: the file that a trash folder keeps about it,
    and its text.
    """

    source: str
    target: str
    token: str
    sha256: str
    bytes: int
    mtime_ns: int
    mode: int
    info: str = ""
    text: str = ""


@dataclass(frozen=True)
class Act:
    """All steps for one LoRA file. kind: ``move``, ``trash`` or ``link``."""

    number: int
    kind: str
    steps: tuple[Step, ...]


@dataclass
class Log:
    """A log as it was read. head: the first record; state: number of an act → ``done``,
    ``undone``, or ``begun`` where the run ended in the middle of it."""

    path: Path
    head: dict[str, Any]
    acts: list[Act] = field(default_factory=list)
    state: dict[int, str] = field(default_factory=dict)

    @property
    def open(self) -> list[Act]:
        """What could be undone, the last first."""
        return [act for act in reversed(self.acts) if self.state[act.number] != "undone"]

    @property
    def unfinished(self) -> list[Act]:
        """What was begun and not finished."""
        return [act for act in self.open if self.state[act.number] == "begun"]

    def mark(self, number: int, word: str) -> None:
        """Write what became of an act."""
        _append(self.path, {"n": number, "state": word})
        self.state[number] = word

    def begin(self, kind: str, steps: list[Step]) -> Act:
        """Write an act before it is done; when this returns it is on the drive."""
        act = Act(len(self.acts) + 1, kind, tuple(steps))
        record = {"n": act.number, "kind": kind, "steps": [asdict(step) for step in steps]}
        _append(self.path, record)
        self.acts.append(act)
        self.state[act.number] = "begun"
        return act


def folder_of(index: Path) -> Path:
    """Where the logs of an index stand."""
    return index.with_name(index.name + ".undo")


def create(index: Path, plan: str, how: str) -> Log:
    """A new log; raises CleanProblem where none can be written."""
    folder = folder_of(index)
    now = datetime.now(UTC)
    name = f"{now:%Y-%m-%dT%H-%M-%S.%f}-{secrets.token_hex(2)}.jsonl"
    head = {"lorafind_undo": VERSION, "plan": plan, "how": how, "made": now.isoformat()}
    try:
        folder.mkdir(exist_ok=True)
        (folder / name).touch(exist_ok=False)
        _append(folder / name, head)
        sync_folder(os.fspath(folder))
        sync_folder(os.fspath(folder.parent))
    except OSError as error:
        raise CleanProblem(
            f"Nothing was done, for the undo log {folder / name} cannot be written "
            f"({error.strerror}): make its folder writable, or free some space."
        ) from error
    return Log(folder / name, head)


def logs(index: Path) -> list[Log]:
    """The logs of an index, the oldest first; logs without a whole first line did nothing."""
    folder = folder_of(index)
    paths = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [log for path in paths if (log := read(path)) is not None]


def read(path: Path) -> Log | None:
    """A log; None where its first line was cut. Raises CleanProblem for what is no log."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CleanProblem(f"The undo log {path} cannot be read: {error.strerror}.") from error
    log: Log | None = None
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if log is None:
                if record["lorafind_undo"] != VERSION:
                    raise CleanProblem(
                        f"{path} was written by a newer lorafind: update lorafind to undo it."
                    )
                log = Log(path, record)
            elif "steps" in record:
                steps = tuple(Step(**step) for step in record["steps"])
                log.acts.append(Act(record["n"], record["kind"], steps))
                log.state[record["n"]] = "begun"
            else:
                log.state[record["n"]] = record["state"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            # A cut line that was gone on after: what began it was never done.
            if isinstance(error, ValueError) and log is not None:
                continue
            raise CleanProblem(f"{path} is no undo log of lorafind: line {number}.") from error
    return log


def _append(path: Path, record: dict[str, Any]) -> None:
    """One synced line. A cut line before it is ended first, so that it spoils no other."""
    with open(path, "r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        cut = False
        if end:
            file.seek(end - 1)
            cut = file.read(1) != b"\n"
        line = (b"\n" if cut else b"") + json.dumps(record).encode() + b"\n"
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
