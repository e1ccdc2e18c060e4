"""The way back, from the log and what is on the disk: also from the middle of an act.

Every step is judged by what stands at its paths now, so that it does not matter where a run ended,
and undoing twice, or after a crash of the undoing itself, is the same as undoing once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from lorafind.clean import moves, trash
from lorafind.clean.log import Act, Log, Step


@dataclass(frozen=True)
class Back:
    """What became of one file. outcome: ``back`` (where it was), ``there`` (it had not moved) or
    ``stays`` (where it is, with the reason in one sentence)."""

    path: str
    outcome: str
    source: str
    reason: str = ""


def undo(log: Log) -> Iterator[Back]:
    """Undo all acts of a log, the last first; what cannot be undone says why and can be retried."""
    for act in log.open:
        yield from undo_act(log, act)


def undo_act(log: Log, act: Act) -> list[Back]:
    """Undo one act, and write so where all of its files are back."""
    found = []
    for step in reversed(act.steps):
        try:
            found.append(_link(step) if act.kind == "link" else _move(step))
        except OSError as error:
            found.append(Back(step.source, "stays", _where(act, step), sentence(error)))
    if all(back.outcome != "stays" for back in found):
        # Where the log's drive is full, undoing again finds the files back.
        with suppress(OSError):
            log.mark(act.number, "undone")
    return found


def sentence(error: OSError) -> str:
    """Why the system refused, for a person."""
    why = error.strerror or str(error) or type(error).__name__
    name = error.filename2 or error.filename
    return f"{os.fsdecode(name)}: {why}" if name else why


def _where(act: Act, step: Step) -> str:
    return step.source if act.kind == "link" else step.target


def _move(step: Step) -> Back:
    here, there = os.path.lexists(step.source), os.path.lexists(step.target)
    if here and there:
        if not _ours_twice(step):
            _clear(step)
            if _is(step.target, step):
                reason = "another file has taken its place; move that away and undo again"
                return Back(step.source, "stays", step.target, reason)
            if not _is(step.source, step):
                reason = "it changed since, and what is in its place is another file"
                return Back(step.source, "stays", step.target, reason)
            return Back(step.source, "there", step.target)
        os.unlink(step.target)
        there = False
    _clear(step)
    if here:
        _forget(step)
        return Back(step.source, "there", step.target)
    if not there:
        reason = "it is neither where it was nor where it was put"
        return Back(step.source, "stays", step.target, reason)
    if not _is(step.target, step):
        return Back(step.source, "stays", step.target, "it changed since")
    folder = os.path.dirname(step.source)
    if not os.path.isdir(folder):
        # Perhaps of a drive that is not mounted: to make it would fill the mount point.
        reason = f"the folder {folder} is not there; make or mount it and undo again"
        return Back(step.source, "stays", step.target, reason)
    moves.move(step.target, step.source, step.token, step.sha256)
    _forget(step)
    return Back(step.source, "back", step.target)


def _ours_twice(step: Step) -> bool:
    """True where the target is a second name, a whole copy or a placeholder of the source."""
    if os.path.samestat(os.lstat(step.source), os.lstat(step.target)):
        return True
    return _is(step.source, step) and (os.lstat(step.target).st_size == 0 or _is(step.target, step))


def _is(path: str, step: Step) -> bool:
    """True where a path is a regular file with the bytes of the step's file."""
    if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) != step.bytes:
        return False
    return moves.digest(path)[0] == step.sha256


def _clear(step: Step) -> None:
    """Remove what a copy or a link left half done."""
    for target in (step.source, step.target):
        _drop(moves.part_of(target, step.token))


def _drop(part: str) -> None:
    # A read-only drive refuses even to remove what is not there.
    if os.path.lexists(part):
        os.unlink(part)


def _forget(step: Step) -> None:
    if step.info:
        trash.forget(step.info, step.text)


def aside_of(path: str, token: str) -> str:
    """The second name of a file while a link takes its place."""
    return os.path.join(os.path.dirname(path), f".lorafind-{token}-file.part")


def _link(step: Step) -> Back:
    aside, part = aside_of(step.source, step.token), moves.part_of(step.source, step.token)
    _drop(part)
    if os.path.lexists(aside):
        if os.path.lexists(step.source) and os.path.samestat(
            os.lstat(aside), os.lstat(step.source)
        ):
            # Two names of one file: a rename would leave both (rename(2)).
            os.unlink(aside)
            return Back(step.source, "there", step.target)
        if os.path.lexists(step.source) and not _leads_to_keeper(step):
            reason = f"another file has taken its place; its own is {aside}"
            return Back(step.source, "stays", step.target, reason)
        os.replace(aside, step.source)
        return Back(step.source, "back", step.target)
    if os.path.lexists(step.source) and not _leads_to_keeper(step):
        if _is(step.source, step):
            return Back(step.source, "there", step.target)
        return Back(step.source, "stays", step.target, "it changed since")
    moves.copy(step.target, part, step.sha256)
    os.chmod(part, step.mode)
    os.utime(part, ns=(step.mtime_ns, step.mtime_ns))
    os.replace(part, step.source)
    moves.sync_folder(os.path.dirname(step.source))
    return Back(step.source, "back", step.target)


def _leads_to_keeper(step: Step) -> bool:
    if os.path.islink(step.source):
        return os.readlink(step.source) == step.target
    return os.path.exists(step.target) and os.path.samefile(step.source, step.target)
