"""What ``merge``, ``export`` and ``import`` share: where to, and what was taken in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.options import Session
from lorafind.cli.output import Column, nearby

if TYPE_CHECKING:
    from lorafind.exchange.intake import Taken
    from lorafind.exchange.merge import Merged

COLUMNS = (
    Column("path", "Index", nearby),
    Column("files", "New files", ",", "right"),
    Column("changed", "Known better", ",", "right"),
    Column("loras", "New LoRAs", ",", "right"),
    Column("renewed", "Renewed", ",", "right"),
    Column("relations", "Relations", ",", "right"),
)

Folder = Annotated[
    Path | None,
    typer.Argument(help="A folder of Parquet files.", metavar="DIR", show_default=False),
]
Lance = Annotated[
    str | None,
    typer.Option(
        "--lancedb",
        help="A LanceDB database instead: a folder, s3://… or db://….",
        metavar="URI",
        show_default=False,
    ),
]


def either(folder: Path | None, lancedb: str | None) -> None:
    """Raises BadParameter unless exactly one of the two is given."""
    if (folder is None) == (lancedb is None):
        raise typer.BadParameter("name either a folder or --lancedb URI")


def tell(session: Session, merged: Merged) -> None:
    """What was taken in, one line a source."""
    session.sink.rows(COLUMNS, map(_row, merged.sources))
    if not merged.anything:
        session.sink.note("The index held everything already: nothing was changed.")
    for taken in merged.sources:
        for sentence in taken.conflicts:
            session.sink.note(sentence)
    for sentence in merged.missing:
        session.sink.warn(sentence)
    if merged.relations:
        session.sink.note(f"{merged.relations:,} new relations: `lorafind dupes` shows copies.")


def _row(taken: Taken) -> dict[str, Any]:
    return {
        "path": taken.source,
        "files": taken.files,
        "changed": taken.changed,
        "loras": taken.loras,
        "renewed": taken.renewed,
        "relations": taken.relations,
        "bases": taken.bases,
    }
