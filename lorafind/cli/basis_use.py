"""``lorafind basis use``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby
from lorafind.cli.watch import Watch

COLUMNS = (Column("path", "Cannot be embedded", nearby), Column("reason", "Why"))


@command
def use(
    session: Session,
    name: Annotated[
        str,
        typer.Argument(
            help="own (the collection's), a basis of the index, a file, or hf:owner/name@revision."
        ),
    ],
    offline: Annotated[
        bool, typer.Option("--offline", help="Take a basis of the Hub from the cache only.")
    ] = False,
) -> int | None:
    """Make a basis the one in which similar compares, and embed every LoRA with it.

    A basis over style works from the stored signatures; one over θ or another feature reads every
    file again. Listed are the LoRAs that it cannot embed: similar leaves them out.
    """
    from lorafind.api import Index

    with Index.open(session.db, write=True) as index, Watch(session.sink) as watch:
        used = index.use_basis(name, offline, watch)
    if isinstance(used, list):
        where = f" for {', '.join(used)}" if used else ""
        session.sink.note(f"{name} is in use{where}.")
        session.sink.rows(COLUMNS, ())
        return None
    session.sink.note(
        f"{used.name} ({used.id}) is in use for {used.architecture}: {used.embedded} LoRAs "
        f"embedded, {len(used.refused)} left out."
    )
    if used.verdict:
        session.sink.note(used.verdict)
    rows = ({"path": path, "reason": reason} for path, reason in used.refused)
    session.sink.rows(COLUMNS, rows)
    return Code.PARTIAL if used.refused else None
