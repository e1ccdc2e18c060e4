"""``lorafind apply``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.clean.apply import How, Kind

COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "Now"),
    Column("to", "At", nearby),
    Column("bytes", "Bytes", ",d", "right"),
    Column("keeper", "Stays", nearby),
    Column("reason", "Why"),
)


@command
def apply(
    session: Session,
    plan: Annotated[
        Path,
        typer.Argument(help="A plan of `lorafind dupes --plan`, edited or not.", metavar="PLAN"),
    ],
    to_trash: Annotated[
        bool, typer.Option("--to-trash", help="Move the files to the trash of the desktop.")
    ] = False,
    move: Annotated[
        Path | None,
        typer.Option(
            help="Move them to this folder, each below the name of its indexed folder.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    link: Annotated[
        bool,
        typer.Option(
            "--link",
            help="Replace each by a link to the file that stays: a hard link on one drive, a "
            "symbolic link otherwise. Only files of the same bytes (grade file).",
        ),
    ] = False,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder whose files stay, beside those of the plan (repeat it).",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> int | None:
    """Carry out a plan: files that are proved to be held by another go, with their sidecars.

    Every file and the one that stays for it are looked at and hashed anew right before; what
    changed stays. `lorafind undo` takes it back.
    """
    from lorafind.api import Index
    from lorafind.clean.apply import How, settle
    from lorafind.clean.plan import read

    if to_trash + (move is not None) + link != 1:
        raise typer.BadParameter("say what to do: one of --to-trash, --move DIR and --link")
    kind: Kind = "move" if move is not None else "trash" if to_trash else "link"
    how = How(kind, str(move or ""))
    wanted = read(plan.expanduser())
    count = len(wanted.removals)
    if not count:
        session.sink.note("The plan lets no file go; nothing was done.")
        session.sink.rows(COLUMNS, [])
        return None
    if not yes:
        what = _words(how, f"{count:,d} {'file' if count == 1 else 'files'}")
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise typer.BadParameter(
                f"the plan would {what}: agree to it with --yes. Nothing was done"
            )
        if not typer.confirm(f"{what[0].upper()}{what[1:]}?", err=True):
            session.sink.note("Nothing was done.")
            return None
    with Index.open(session.db) as readable:
        # Not made where there is none: a plan without its index has no proofs.
        place = readable.store.path
    with Index.open(place, write=True) as index:
        for back in settle(index.store):
            session.sink.warn(
                f"{back.path}: a run that was broken off had begun with it; "
                + (f"it stays at {back.source}: {back.reason}." if back.reason else "taken back.")
            )
        told: Counter[str] = Counter()
        freed = 0

        def rows(watch: Watch) -> Iterator[dict[str, Any]]:
            nonlocal freed
            for row in index.apply(wanted, how, protect or (), watch):
                told[row.outcome] += 1
                freed += row.bytes
                shown = vars(row)
                if session.sink.mode is Mode.PATHS and row.outcome != DONE[how.kind]:
                    shown = {**shown, "path": None}
                yield shown

        try:
            with Watch(session.sink) as watch:
                session.sink.rows(COLUMNS, rows(watch))
        except BaseException:
            # A table may not have been shown yet.
            if done := told[DONE[how.kind]]:
                session.sink.warn(f"{done:,d} {DONE[how.kind]} before; `lorafind undo` undoes it.")
            raise
    done = told.pop(DONE[how.kind], 0)
    rest = "".join(
        f", {number:,d} {'stay' if word == 'stays' else word}"
        for word, number in sorted(told.items())
    )
    session.sink.note(f"{done:,d} {DONE[how.kind]} ({freed / 1e6:,.1f} MB){rest}.")
    if done:
        session.sink.note("`lorafind undo` takes it back; `lorafind index` brings the index up.")
    return Code.PARTIAL if told["failed"] or told["untouched"] else None


#: kind → the outcome of a file that went
DONE = {"move": "moved", "trash": "trashed", "link": "linked"}


def _words(how: How, files: str) -> str:
    return {
        "move": f"move {files} to {how.folder}",
        "trash": f"move {files} to the trash",
        "link": f"replace {files} by links",
    }[how.kind]
