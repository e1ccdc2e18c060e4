"""A folder of Parquet files, ``<table>.parquet`` each: there as a whole, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind.exchange.tables import KEY, TABLES, Table
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ENDING = ".parquet"


def local(folder: str | os.PathLike[str]) -> Path:
    """The folder's absolute path. Raises IndexProblem for a URL."""
    if re.match("[a-z][a-z0-9+.-]+:/", os.fspath(folder)):
        raise IndexProblem(
            f"{os.fspath(folder)} is a URL, where no folder can be put in place as a whole: export "
            "to a folder and copy it, or use --lancedb."
        )
    return Path(os.path.abspath(folder))


def check(folder: Path, force: bool) -> None:
    """Raises IndexProblem where something stands in the way of an export."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    try:
        ParquetTables(folder).facts(TABLES[-1])
    except IndexProblem as error:
        raise IndexProblem(
            f"{folder} is there already and holds no export: choose another folder."
        ) from error
    foreign = [p.name for p in folder.iterdir() if p.suffix != ENDING or not p.is_file()]
    if foreign:
        raise IndexProblem(
            f"{folder} holds {foreign[0]} beside an export: choose another folder, or move it away."
        )
    if not force:
        raise IndexProblem(f"{folder} holds an export already: --force replaces it.")


def write(folder: Path, tables: Iterable[Table], watch: Progress) -> dict[str, int]:
    """Write tables beside ``folder`` and put them in its place; table → rows.

    What was there is removed last. A run that is killed leaves a folder ``.<name>-….part``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}.part")
    made.mkdir()
    try:
        counts = {}
        for table in tables:
            counts[table.name] = 0
            watch.stage(f"Writing {table.name}", 0, 0)
            path = made / f"{table.name}{ENDING}"
            with open(path, "wb") as file:
                # Dictionaries of numbers that never repeat only cost time.
                often = [f.name for f in table.schema if pa.types.is_string(f.type)]
                with pq.ParquetWriter(
                    file, table.schema, compression="zstd", use_dictionary=often
                ) as writer:
                    for batch in table.batches:
                        writer.write_batch(batch, row_group_size=max(1, batch.num_rows))
                        counts[table.name] += batch.num_rows
                        watch.advance(batch.num_rows, 0)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            old = made.with_suffix(".old")
            os.replace(folder, old)
            os.replace(made, folder)
            shutil.rmtree(old)
        else:
            os.replace(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return counts


class ParquetTables:
    """The files of an export; raises IndexProblem where there are none, or one is damaged."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = local(folder)
        self.label = str(folder)

    def facts(self, name: str) -> dict[str, Any]:
        entry = (self._open(name).schema_arrow.metadata or {}).get(KEY)
        if entry is None:
            raise IndexProblem(f"{self._path(name)} was not written by `lorafind export`.")
        facts: dict[str, Any] = json.loads(entry)
        return facts

    def count(self, name: str) -> int:
        return int(self._open(name).metadata.num_rows)

    def columns(self, name: str) -> list[str]:
        return list(self._open(name).schema_arrow.names)

    def batches(
        self, name: str, size: int, between: tuple[int, int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        with self._told(name), self._open(name) as file:
            groups = list(range(file.num_row_groups))
            if between is not None:
                place = file.schema_arrow.names.index("lora")
                groups = [g for g in groups if _overlap(file, g, place, between)]
            for group in groups:
                # All of them together would stay in memory until the last.
                yield from file.iter_batches(size, row_groups=[group])

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{ENDING}"

    def _open(self, name: str) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        if not self._path(name).is_file():
            raise IndexProblem(
                f"{self.folder} holds no export of lorafind: there is no {name}{ENDING}."
            )
        with self._told(name):
            return pq.ParquetFile(self._path(name))

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            said = str(error).splitlines()[0]
            raise IndexProblem(
                f"{self._path(name)} is damaged ({said}): export the index again."
            ) from error


def _overlap(file: pq.ParquetFile, group: int, column: int, between: tuple[int, int]) -> bool:
    """Whether a row group may hold LoRAs of a range."""
    known = file.metadata.row_group(group).column(column).statistics
    if known is None or not known.has_min_max:
        return True
    return bool(known.min <= between[1] and known.max >= between[0])
