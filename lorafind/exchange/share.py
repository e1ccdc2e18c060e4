"""``export`` and ``import``: an index in a store that other tools read, and back."""

from __future__ import annotations

import os
from pathlib import Path

from lorafind.exchange import parquet
from lorafind.exchange.lance import LanceTables
from lorafind.exchange.merge import Merged, take_all
from lorafind.exchange.parquet import ParquetTables
from lorafind.exchange.reading import TableSource
from lorafind.exchange.source import IndexSource
from lorafind.exchange.writing import tables
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store


def export(
    db: Path,
    folder: str | os.PathLike[str] | None = None,
    lancedb: str | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write an index as Parquet files into a folder, or as a LanceDB database; table → rows.

    Exactly one of the two is given, or ValueError is raised. Raises IndexProblem where there is no
    index, or something stands there already (with ``force`` only where it is not an earlier
    export), ModuleNotFoundError without pyarrow or lancedb.
    """
    watch = progress or Silent()
    with IndexSource(db) as source:
        if folder is not None and lancedb is None:
            place = parquet.local(folder)
            parquet.check(place, force)
            return parquet.write(place, tables(source), watch)
        if lancedb is not None and folder is None:
            database = LanceTables(lancedb, make=True)
            database.check(force)
            return database.write(tables(source), watch)
    raise ValueError("name either a folder or a LanceDB database")


def source_of(
    folder: str | os.PathLike[str] | None = None, lancedb: str | None = None
) -> TableSource:
    """An export to take in; errors as those of :func:`export`."""
    if folder is not None and lancedb is None:
        return TableSource(ParquetTables(folder))
    if lancedb is not None and folder is None:
        return TableSource(LanceTables(lancedb))
    raise ValueError("name either a folder or a LanceDB database")


def import_tables(
    store: Store, source: TableSource, *, relate: bool = True, progress: Progress | None = None
) -> Merged:
    """Take an export into an index that is open for writing, by the rules of ``merge``."""
    return take_all(store, [source], relate=relate, progress=progress)
