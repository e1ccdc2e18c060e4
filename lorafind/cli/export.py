"""``lorafind export``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafind.cli.exchanged import Folder, Lance, either
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby
from lorafind.cli.watch import Watch

COLUMNS = (
    Column("path", "Store", nearby),
    Column("table", "Table"),
    Column("rows", "Rows", ",", "right"),
)


@command
def export(
    session: Session,
    folder: Folder = None,
    lancedb: Lance = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier export (never anything else).")
    ] = False,
) -> int | None:
    """Write the index as tables that other tools read: Parquet files, or a LanceDB database.

    All of it goes along: files, LoRAs, signatures, relations, and for every architecture its
    embeddings in the basis in use as vectors that DuckDB or LanceDB can search. `lorafind import`
    makes an index of it again.
    """
    from lorafind.exchange.share import export as write
    from lorafind.index.opening import location

    either(folder, lancedb)
    with Watch(session.sink) as watch:
        counts = write(
            location(session.db),
            folder and folder.expanduser(),
            lancedb,
            force=force,
            progress=watch,
        )
    place = lancedb or str(folder)
    session.sink.rows(
        COLUMNS, ({"path": place, "table": name, "rows": n} for name, n in counts.items())
    )
    return None
