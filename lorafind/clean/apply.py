"""Carries out a plan: every file and its keeper are looked at and hashed right before it goes.

Evidence for an act, in this order: the file is in the plan with ``remove``; the index holds a proof
that a file which the plan keeps in the same group holds all that it does; both are on the disk,
regular, two files, and their SHA-256 are those that the proof is about. Then the act is written to
the undo log, and only then done. An act that fails half way is taken back at once.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafind.clean import log as logs
from lorafind.clean import moves, trash
from lorafind.clean.beside import beside
from lorafind.clean.log import Act, Log, Step
from lorafind.clean.plan import Item, Plan
from lorafind.clean.problem import CleanProblem
from lorafind.clean.undo import Back, aside_of, sentence, undo_act
from lorafind.files.place import is_remote
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store
from lorafind.search.dupes import PROVED, Choice, Judge

Kind = Literal["move", "trash", "link"]
#: What is said of a file that went.
WORD: dict[str, str] = {"move": "moved", "trash": "trashed", "link": "linked"}
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class How:
    """What to do with the files of a plan. folder: for ``move``; it is made absolute.

    Raises ValueError for a ``move`` without a folder, and for a folder with another kind.
    """

    kind: Kind
    folder: str = ""

    def __post_init__(self) -> None:
        if (self.kind == "move") != bool(self.folder):
            raise ValueError("a folder belongs to 'move', and to nothing else")
        if self.folder:
            absolute = os.path.abspath(os.path.expanduser(self.folder))
            object.__setattr__(self, "folder", absolute)


@dataclass(frozen=True)
class Outcome:
    """What really happened to a file of a plan.

    outcome: ``moved``, ``trashed``, ``linked``; ``stays`` (with the reason: what it is now, or what
    stood in the way), ``gone`` (it was no longer there), ``failed`` (the system refused; it is
    where it was) or ``untouched`` (its turn did not come). to: where it is now. keeper: the file
    that stays for it. with_it: sidecars that went along, their new paths.
    """

    path: str
    outcome: str
    to: str = ""
    bytes: int = 0
    keeper: str = ""
    reason: str = ""
    with_it: tuple[str, ...] = ()


class _Stays(Exception):
    """A file may not go; the message says why."""


class _HalfWay(Exception):
    """An act failed and could not be taken back whole; the message says what is where."""


def settle(store: Store) -> list[Back]:
    """Take back what runs that were killed had begun and not finished, by their logs."""
    return [
        back
        for log in reversed(logs.logs(store.path))
        for act in log.unfinished
        for back in undo_act(log, act)
    ]


def apply(
    store: Store,
    plan: Plan,
    how: How,
    protect: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Do what a plan says, one file after the other; every file of it gets its outcome.

    store: open for writing, which keeps other runs out. protect: folders whose files stay, beside
    those of the plan. Raises CleanProblem before anything is done where the system has no trash
    that can be used or the log cannot be written.
    """
    if how.kind == "trash":
        trash.supported()
    settle(store)
    choice = Choice(
        (*PROVED, *(grade for grade in plan.grades if grade not in PROVED)),
        plan.grades,
        protect=(*plan.protect, *protect),
    )
    run = _Run(store, plan, how, Judge(store, choice))
    progress = progress or Silent()
    removals = plan.removals
    progress.stage("Applying the plan", len(removals), 0)
    stopped = ""
    for item, group in removals:
        if stopped:
            yield Outcome(item.path, "untouched", reason=stopped)
            continue
        try:
            yield run.one(item, group)
        except _Stays as error:
            yield Outcome(item.path, "stays", reason=str(error))
        except CleanProblem as error:
            if run.log is None:
                raise
            # What went before is to be told too.
            stopped = str(error)
            yield Outcome(item.path, "untouched", reason=stopped)
        except _HalfWay as error:
            yield Outcome(item.path, "failed", reason=str(error))
        except OSError as error:
            full = error.errno in _FULL
            yield Outcome(item.path, "failed", reason=f"{sentence(error)}; it is where it was")
            stopped = "the disk is full; free some space and apply the plan again" if full else ""
        progress.advance(1, 0)


class _Run:
    def __init__(self, store: Store, plan: Plan, how: How, judge: Judge) -> None:
        self.plan, self.how, self.judge = plan, how, judge
        self.index = store.path
        self.roots = [(os.fsdecode(root.path), root.single) for root in store.roots()]
        self.log: Log | None = None
        self.kept = _identities(item.path for g in plan.groups for item in g if not item.remove)

    def one(self, item: Item, group: tuple[Item, ...]) -> Outcome:
        """Check and do one file; raises _Stays, or OSError where it is as it was."""
        if is_remote(item.path):
            raise _Stays("it is in a store, where nothing is removed")
        if not os.path.lexists(item.path):
            return Outcome(item.path, "gone", reason="it is no longer there")
        keeper, facts = self._checked(item, group)
        if self.how.kind == "link":
            self._link(item, keeper, facts)
            return Outcome(item.path, "linked", keeper, facts.st_size, keeper)
        return self._move(item, keeper, facts)

    def _checked(self, item: Item, group: tuple[Item, ...]) -> tuple[str, os.stat_result]:
        """(keeper, facts of the file) where the file may go right now; else raises _Stays."""
        reasons: list[str] = []
        for other in group:
            if other.remove:
                continue
            grade, why = self.judge.verdict(other.path, item.path)
            if not why and self.how.kind == "link" and grade != "file":
                why = f"its grade is {grade}, and only files of the same bytes can become links"
            if not why:
                why, facts = self._seen(other, item)
            if not why and facts:
                return other.path, facts
            reasons.append(why)
        raise _Stays("; ".join(dict.fromkeys(reasons)))

    def _seen(self, keeper: Item, item: Item) -> tuple[str, os.stat_result | None]:
        """(why the file may not go, its facts) from the disk as it is now."""
        if os.path.islink(item.path) or os.path.islink(keeper.path):
            return "a link", None
        sums = []
        for one in (keeper, item):
            known = self.judge.file(one.path)
            try:
                found = moves.digest(one.path)
            except OSError as error:
                return f"{one.path} cannot be read ({error.strerror})", None
            if known is None or found[0] != known.sha256 or found[0] != one.sha256:
                return f"{one.path} changed since the plan was made", None
            sums.append(found)
        (kept, stays), (gone, goes) = sums
        if os.path.samestat(stays, goes) or (goes.st_dev, goes.st_ino) in self.kept:
            return "a second path to a file that stays", None
        if self.how.kind == "link" and kept != gone:
            return "its bytes are not those of the file that stays", None
        alike = ("st_size", "st_mtime_ns", "st_ctime_ns")
        if all(getattr(stays, fact) == getattr(goes, fact) for fact in alike) and (
            stays.st_dev != goes.st_dev
        ):
            return "perhaps the same file on two mounts", None
        return "", goes

    def _begin(self, steps: list[Step]) -> tuple[Log, Act]:
        if self.log is None:
            self.log = logs.create(self.index, self.plan.path, self.how.kind)
        try:
            return self.log, self.log.begin(self.how.kind, steps)
        except OSError as error:
            raise CleanProblem(
                f"The undo log {self.log.path} cannot be written ({error.strerror}): nothing more "
                "was done. Free some space and apply the plan again."
            ) from error

    def _act(self, steps: list[Step], keeper: str) -> None:
        """Write the act, do it, and see that the keeper is still there; else take it back."""
        log, act = self._begin(steps)
        try:
            for step in steps:
                if self.how.kind == "link":
                    _replace(step)
                    continue
                if step.info:
                    trash.record(step.info, step.text)
                moves.move(step.source, step.target, step.token, step.sha256)
            if not os.path.isfile(keeper):
                raise OSError(errno.ENOENT, "the file that stays went with it", keeper)
            log.mark(act.number, "done")
        except BaseException as error:
            left = [back for back in undo_act(log, act) if back.outcome == "stays"]
            if left and isinstance(error, OSError):
                where = "; ".join(
                    f"{back.path} is at {back.source}: {back.reason}" for back in left
                )
                raise _HalfWay(f"{sentence(error)}; {where}") from error
            raise

    def _move(self, item: Item, keeper: str, facts: os.stat_result) -> Outcome:
        if _inside(item.path, self.how.folder):
            raise _Stays(f"it is in {self.how.folder} already")
        own, stay = beside(item.path)
        targets = self._targets([item.path, *own])
        steps = [_step(item.path, item.sha256, facts, *targets[0])]
        steps += [
            _step(path, *moves.digest(path), *to) for path, to in zip(own, targets[1:], strict=True)
        ]
        self._act(steps, keeper)
        return Outcome(
            item.path,
            WORD[self.how.kind],
            steps[0].target,
            facts.st_size,
            keeper,
            f"shared with another file, or a link, so it stays: {', '.join(stay)}" if stay else "",
            tuple(step.target for step in steps[1:]),
        )

    def _targets(self, paths: list[str]) -> list[tuple[str, str, str]]:
        """(target, record in the trash, its text) of files that go together."""
        if self.how.kind == "trash":
            return trash.places(trash.bin_for(paths[0]), paths)
        top, below = self._below(os.path.dirname(paths[0]))
        number = 1
        while True:
            name = top if number == 1 else f"{top} ({number})"
            folder = os.path.normpath(os.path.join(self.how.folder, name, below))
            places = [os.path.join(folder, os.path.basename(path)) for path in paths]
            if not any(map(os.path.lexists, places)):
                return [(place, "", "") for place in places]
            number += 1

    def _below(self, folder: str) -> tuple[str, str]:
        """(name of the indexed folder that a folder is in, what follows below it)."""
        inside = [
            root
            for root, single in self.roots
            if not single and (folder + os.sep).startswith(root.rstrip(os.sep) + os.sep)
        ]
        root = max(inside, key=len, default=folder)
        return os.path.basename(root.rstrip(os.sep)) or "files", os.path.relpath(folder, root)

    def _link(self, item: Item, keeper: str, facts: os.stat_result) -> None:
        folder = os.path.dirname(item.path)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "the folder cannot be written", folder)
        self._act([_step(item.path, item.sha256, facts, keeper)], keeper)


def _identities(paths: Iterable[str]) -> set[tuple[int, int]]:
    found = set()
    for path in paths:
        # What is not there, or out of reach, cannot be another name of a file that goes.
        with suppress(OSError):
            facts = os.stat(path)
            found.add((facts.st_dev, facts.st_ino))
    return found


def _inside(path: str, folder: str) -> bool:
    return bool(folder) and os.path.realpath(path).startswith(
        os.path.realpath(folder).rstrip(os.sep) + os.sep
    )


def _step(
    path: str, sha256: str, facts: os.stat_result, target: str, info: str = "", text: str = ""
) -> Step:
    mode = stat.S_IMODE(facts.st_mode)
    token = secrets.token_hex(8)
    return Step(path, target, token, sha256, facts.st_size, facts.st_mtime_ns, mode, info, text)


def _replace(step: Step) -> None:
    """Put a link to the keeper in the place of a file; at no moment is the place empty.

    The file keeps a second name until it is certain that nobody wrote into it meanwhile.
    """
    part, aside = moves.part_of(step.source, step.token), aside_of(step.source, step.token)
    try:
        os.link(step.target, part)
    except OSError as error:
        if error.errno not in moves.NO_LINKS | {errno.EXDEV}:
            raise
        os.symlink(step.target, part)
    os.link(step.source, aside)
    os.replace(part, step.source)
    found, facts = moves.digest(aside)
    if found != step.sha256 or facts.st_mtime_ns != step.mtime_ns:
        raise moves.Changed(errno.EBUSY, "it changed while it was replaced", step.source)
    Path(aside).unlink()
    moves.sync_folder(os.path.dirname(step.source))
