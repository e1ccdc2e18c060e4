"""``lorafind undo``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby

COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "Now"),
    Column("source", "Was at", nearby),
    Column("reason", "Why"),
)
RUNS = (
    Column("path", "Log", nearby),
    Column("made", "When"),
    Column("how", "Did"),
    Column("files", "Files", ",d", "right"),
    Column("plan", "Plan", nearby),
)


@command
def undo(
    session: Session,
    log: Annotated[
        Path | None,
        typer.Argument(
            help="The log of a run (see --list); the last run that is not undone for none.",
            metavar="LOG",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="Only list the runs that can be undone.")
    ] = False,
) -> int | None:
    """Take back what `lorafind apply` did, also what a broken-off run left half done.

    Files go back to where they were, with their sidecars; nothing that stands there is replaced.
    """
    from lorafind.api import Index
    from lorafind.clean.log import read
    from lorafind.clean.problem import CleanProblem

    with Index.open(session.db) as index:
        runs = index.undo_logs()
        place = index.store.path
    if listed:
        session.sink.rows(
            RUNS,
            (
                {
                    "path": str(run.path),
                    "made": run.head["made"],
                    "how": run.head["how"],
                    "files": len(run.open),
                    "plan": run.head["plan"],
                }
                for run in runs
            ),
        )
        return None
    chosen = read(log.expanduser()) if log else (runs[-1] if runs else None)
    if chosen is None:
        raise CleanProblem("There is nothing to undo: no run of `lorafind apply` is left.")
    told: Counter[str] = Counter()
    with Index.open(place, write=True) as index:

        def rows() -> Iterator[dict[str, Any]]:
            for back in index.undo(chosen):
                told[back.outcome] += 1
                yield vars(back)

        session.sink.rows(COLUMNS, rows())
        earlier = len(index.undo_logs())
    session.sink.note(
        f"{told['back']:,d} back, {told['there']:,d} had not moved, {told['stays']:,d} could not "
        "be taken back."
    )
    if told["stays"]:
        return Code.PARTIAL
    if earlier:
        session.sink.note(f"Earlier runs that can be undone: {earlier} (`lorafind undo --list`).")
    return None
