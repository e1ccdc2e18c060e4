"""``lorafind import``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafind.cli.exchanged import Folder, Lance, either, tell
from lorafind.cli.options import Session, command
from lorafind.cli.watch import Watch


@command
def import_(
    session: Session,
    folder: Folder = None,
    lancedb: Lance = None,
    relations: Annotated[
        bool,
        typer.Option("--relations/--no-relations", help="Prove relations and fit bases now."),
    ] = True,
) -> int | None:
    """Take what `lorafind export` wrote into the index, as `lorafind merge` takes an index.

    The index of --db is made where there is none; nothing is ever taken out of it. Safe to
    interrupt and to repeat.
    """
    from lorafind.exchange.share import import_tables, source_of
    from lorafind.index.store import Store

    either(folder, lancedb)
    # What cannot be read must not leave an empty index behind.
    source = source_of(folder and folder.expanduser(), lancedb)
    with Store.open(session.db, "write") as store, Watch(session.sink) as watch:
        taken = import_tables(store, source, relate=relations, progress=watch)
    tell(session, taken)
    return None
