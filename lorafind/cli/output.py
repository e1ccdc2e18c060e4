"""The one sink: results go to stdout in the mode asked for, everything else to stderr.

Modes: a table for people; TSV, CSV, JSON and JSON Lines for programs, always UTF-8 and with ``\\n``
as line end on every system; NUL-terminated paths, byte for byte, for ``xargs -0``.

TSV and CSV hold the columns only, JSON every field of a row. In TSV, CSV and tables a control
character or an undecodable byte of a file name is written as an escape (``\\t``, ``\\x1b``), so
that a row is one line and no name can drive the terminal; in JSON as ``\\u001b`` or ``\\udcff``.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Protocol

import typer

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]

#: Rows of a long table that are shown together.
_BLOCK = 500

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNSAFE_JSON = re.compile("[\x7f-\x9f\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


class Mode(Enum):
    """How results are written."""

    TABLE = "table"
    TSV = "tsv"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"
    PATHS = "paths"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a result.

    key: the field of the row, and the name in a TSV or CSV header.
    title: the heading for people.
    format: for people: a format specification (``".3f"``) or a function of the value.
    digits: decimals of a float in TSV and CSV.
    """

    key: str
    title: str
    format: str | Callable[[Any], str] = ""
    justify: Literal["left", "right"] = "left"
    digits: int = 6

    def shown(self, row: Row) -> str:
        """The value for people; nothing for None."""
        given = row.get(self.key)
        value = plain(given)
        if value is None:
            return ""
        if callable(self.format):
            return clean(self.format(given))
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return format(value, self.format or ".3f")
        if isinstance(value, list):
            return clean(", ".join(map(str, value)))
        return as_json(value) if isinstance(value, dict) else clean(format(value, self.format))

    def written(self, row: Row) -> str:
        """The value for programs: fixed decimals, nothing for None, JSON for what is nested."""
        value = plain(row.get(self.key))
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.{self.digits}f}"
        if isinstance(value, bool | list | dict):
            return as_json(value)
        return clean(str(value))


def nearby(path: str) -> str:
    """A path for people: below the current folder relative to it, below home with ``~``."""
    for place, sign in ((os.getcwd(), ""), (os.path.expanduser("~"), f"~{os.sep}")):
        start = place.rstrip(os.sep) + os.sep
        if len(start) > 1 and path.startswith(start):
            return sign + path[len(start) :]
    return path


class ReaderGone(Exception):
    """Who read our stdout (``head``, ``less``) has seen enough."""


class Step(Protocol):
    """Moves a progress bar on; ``total`` may become known, or grow, on the way."""

    def __call__(self, advance: float = 1, *, total: float | None = None) -> None: ...


def clean(text: str) -> str:
    """``text`` on one line, with control characters and undecodable bytes as escapes."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            return f"\\x{code - 0xDC00:02x}"
        return _SHORT.get(character, f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")

    return _UNSAFE.sub(escape, text)


def plain(value: Any) -> Any:
    """``value`` in the types of JSON: NaN and infinities become None, paths text."""
    if value is None or isinstance(value, str | bool):
        return value
    # The abstract numbers take in the scalars of numpy.
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes | os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"a result cannot hold {type(value).__name__}: {value!r}")


def as_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON, readable as it stands, with unsafe characters as ``\\u`` escapes."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return _UNSAFE_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class Sink:
    """Where a command puts what it found.

    A command calls :meth:`rows` or :meth:`record` once. ``count`` is the number of results.
    """

    def __init__(
        self, mode: Mode, *, header: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.mode = mode
        self.header = header
        self.quiet = quiet
        self.verbose = verbose
        self.count = 0

    def rows(self, columns: Sequence[Column], rows: Iterable[Row], *, blocks: bool = False) -> int:
        """Write results as they come; returns how many there were.

        ``blocks``: for people, one block of ``title  value`` lines per row, not a table.
        ``-0`` writes the field ``path`` of each row (str, bytes or path; None is passed over).
        """
        before = self.count
        counted = self._counted(rows)
        if self.mode is Mode.TABLE:
            (self._blocks if blocks else self._table)(columns, counted)
        elif self.mode is Mode.JSON:
            opening = "[\n"
            for row in counted:
                self._write(opening + as_json(row))
                opening = ",\n"
            self._write("[]\n" if opening == "[\n" else "\n]\n")
        elif self.mode is Mode.JSONL:
            for row in counted:
                self._write(as_json(row) + "\n")
        elif self.mode is Mode.PATHS:
            for row in counted:
                self._path(row)
        else:
            self._lines(columns, counted)
        return self.count - before

    def record(self, columns: Sequence[Column], row: Row) -> None:
        """Write the one result of a command: JSON gives an object, not an array."""
        if self.mode is Mode.JSON:
            self.count += 1
            self._write(as_json(row, indent=2) + "\n")
        else:
            self.rows(columns, [row], blocks=True)

    def note(self, text: str) -> None:
        """Say something about the run on stderr; ``--quiet`` leaves it out."""
        if not self.quiet:
            self._say(text)

    def hint(self, command: str) -> None:
        """Name the command to try next on stderr; ``--quiet`` leaves it out."""
        self.note(f"try: {command}")

    def detail(self, text: str) -> None:
        """Say something that only ``--verbose`` asks for."""
        if self.verbose:
            self._say(text)

    def warn(self, text: str) -> None:
        """Say on stderr, also with ``--quiet``, that something is not as it should be."""
        self._say(f"warning: {text}")

    @contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator[Step]:
        """A bar on stderr while the block runs; nothing off a terminal or with ``--quiet``."""
        if self.quiet or not sys.stderr.isatty():
            yield _ignore
            return
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=console(sys.stderr), transient=True) as progress:
            task = progress.add_task(clean(description), total=total)

            def step(advance: float = 1, *, total: float | None = None) -> None:
                progress.update(task, advance=advance, total=total)

            yield step

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.count += 1
            yield row

    def _table(self, columns: Sequence[Column], rows: Iterator[Row]) -> None:
        from rich.table import Table

        shown = ([column.shown(row) for column in columns] for row in rows)
        output = console(sys.stdout)
        block = list(islice(shown, _BLOCK))
        # A long table is shown as it comes: its first block decides the widths.
        fixed = _widths(columns, block, output.width) if len(block) == _BLOCK else None
        header = True
        while block:
            table = Table(
                box=None,
                pad_edge=False,
                padding=(0, 2, 0, 0),
                header_style="bold",
                show_header=header,
            )
            for place, column in enumerate(columns):
                table.add_column(
                    column.title,
                    justify=column.justify,
                    overflow="fold",
                    width=fixed[place] if fixed else None,
                )
            for cells in block:
                table.add_row(*cells)
            output.print(table)
            header = False
            block = list(islice(shown, _BLOCK))

    def _blocks(self, columns: Sequence[Column], rows: Iterator[Row]) -> None:
        from rich.table import Table

        screen = console(sys.stdout)
        for number, row in enumerate(rows):
            if number:
                screen.print()
            block = Table.grid(padding=(0, 2, 0, 0))
            block.add_column(style="bold", no_wrap=True)
            block.add_column(overflow="fold")
            for column in columns:
                if text := column.shown(row):
                    block.add_row(column.title, text)
            screen.print(block)

    def _lines(self, columns: Sequence[Column], rows: Iterator[Row]) -> None:
        if self.header:
            self._write(self._line([column.key for column in columns]))
        for row in rows:
            self._write(self._line([column.written(row) for column in columns]))

    def _line(self, values: Sequence[str]) -> str:
        if self.mode is Mode.TSV:
            return "\t".join(values) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        return line.getvalue()

    def _path(self, row: Row) -> None:
        if "path" not in row:
            raise typer.BadParameter("this command has no paths to write", param_hint="'-0'")
        if row["path"] is not None:
            with _reader():
                sys.stdout.buffer.write(os.fsencode(row["path"]) + b"\0")

    def _write(self, text: str) -> None:
        # Not through the text layer: on Windows that has another encoding and line end.
        with _reader():
            sys.stdout.buffer.write(text.encode())

    def _say(self, text: str) -> None:
        print(clean(text), file=sys.stderr)


def flush() -> None:
    """Hand what is buffered to the reader of stdout; raises ReaderGone like the writes before."""
    with _reader():
        sys.stdout.flush()


@contextmanager
def _reader() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Windows reports a pipe without a reader as an invalid argument.
        if error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL):
            raise ReaderGone from error
        raise


def _widths(columns: Sequence[Column], block: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of columns that hold a block of rows, the widest cut until they fit."""
    from rich.cells import cell_len

    cells = zip(*block, strict=True)
    widths = [
        max(cell_len(column.title), *map(cell_len, values))
        for column, values in zip(columns, cells, strict=True)
    ]
    while sum(widths) + 2 * (len(widths) - 1) > room and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def _ignore(advance: float = 1, *, total: float | None = None) -> None:
    """The step of a bar that is not shown."""


def console(file: Any) -> Console:
    """A console without markup of its own; with NO_COLOR, no escape sequence at all."""
    from rich.console import Console

    return Console(
        file=file,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        markup=False,
        highlight=False,
        emoji=False,
    )
