"""Tables of a LanceDB database, local or remote, beside tables of others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lorafind.exchange.tables import EMBEDDINGS, KEY, TABLES, Table
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa


class LanceTables:
    """A database by its URI: a folder, ``s3://…`` or whatever else LanceDB opens.

    The table ``roots`` is written last and removed first, so that what is not whole is never read.
    make: a folder that is not there may be made. Raises ModuleNotFoundError without lancedb,
    IndexProblem where the database cannot be opened.
    """

    def __init__(self, uri: str, make: bool = False) -> None:
        # It tells of every table that it makes, on stderr.
        os.environ.setdefault("LANCE_LOG", "error")
        import lancedb

        self.label = uri
        if not make and "://" not in uri and not os.path.isdir(uri):
            raise IndexProblem(f"There is no LanceDB database at {uri}: check the path.")
        try:
            self._db = lancedb.connect(uri)
        except (ValueError, OSError, RuntimeError) as error:
            raise self._problem(error) from error

    def names(self) -> set[str]:
        """The tables of the database that an export writes."""
        found: set[str] = set()
        token = None
        while True:
            try:
                page = self._db.list_tables(page_token=token)
            except (ValueError, OSError, RuntimeError) as error:
                raise self._problem(error) from error
            found.update(page.tables)
            token = page.page_token
            if not token:
                return {n for n in found if n in TABLES or n.startswith(EMBEDDINGS)}

    def check(self, force: bool) -> None:
        """Raises IndexProblem where tables stand in the way of an export."""
        there = self.names()
        for name in sorted(there):
            try:
                self.facts(name)
            except IndexProblem as error:
                raise IndexProblem(
                    f"{self.label} has a table {name} that is not lorafind's: choose another place."
                ) from error
        if there and not force:
            raise IndexProblem(f"{self.label} holds an export already: --force replaces it.")

    def write(self, tables: Iterable[Table], watch: Progress) -> dict[str, int]:
        """Write tables in place of those of an earlier export; table → rows."""
        import pyarrow as pa

        counts = {}
        there = self.names()
        try:
            for name in sorted(there, key=lambda name: name != TABLES[-1]):
                self._db.drop_table(name)
            for table in tables:
                watch.stage(f"Writing {table.name}", 0, 0)
                rows = pa.RecordBatchReader.from_batches(table.schema, _watched(table, watch))
                made = self._db.create_table(table.name, data=rows, schema=table.schema)
                counts[table.name] = int(made.count_rows())
        except (ValueError, RuntimeError) as error:
            raise self._problem(error) from error
        return counts

    def facts(self, name: str) -> dict[str, Any]:
        entry = (self._open(name).schema.metadata or {}).get(KEY)
        if entry is None:
            raise IndexProblem(f"The table {name} of {self.label} is not lorafind's.")
        facts: dict[str, Any] = json.loads(entry)
        return facts

    def count(self, name: str) -> int:
        return int(self._open(name).count_rows())

    def columns(self, name: str) -> list[str]:
        return list(self._open(name).schema.names)

    def batches(
        self, name: str, size: int, between: tuple[int, int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        query = self._open(name).search()
        if between is not None:
            query = query.where(f"lora >= {between[0]} AND lora <= {between[1]}")
        try:
            yield from query.to_batches(size)
        except (ValueError, RuntimeError) as error:
            raise self._problem(error) from error

    def _open(self, name: str) -> Any:
        if name not in self.names():
            raise IndexProblem(f"{self.label} holds no whole export: there is no table {name}.")
        return self._db.open_table(name)

    def _problem(self, error: Exception) -> IndexProblem:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return IndexProblem(f"{self.label} cannot be used as a LanceDB database: {said}")


def _watched(table: Table, watch: Progress) -> Iterator[pa.RecordBatch]:
    for batch in table.batches:
        yield batch
        watch.advance(batch.num_rows, 0)
