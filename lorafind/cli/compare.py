"""``lorafind compare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, Row

COLUMNS = (
    Column("kind", "Per"),
    Column("name", "Part"),
    Column("common", "Common", "d", "right"),
    Column("cosine", "Cosine", ".6f", "right", digits=9),
    Column("cosine_all", "With rest", ".6f", "right", digits=9),
    Column("norm_a", "‖A‖", ".4g", "right", digits=9),
    Column("norm_b", "‖B‖", ".4g", "right", digits=9),
    Column("ratio", "B/A", ".4g", "right", digits=9),
    Column("only_a", "Only A", "d", "right"),
    Column("only_b", "Only B", "d", "right"),
)

File = Annotated[str, typer.Argument(help="A file, or a name in the index.", show_default=False)]


@command
def compare(
    session: Session,
    a: File,
    b: File,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin, .ckpt and .pth files.")
    ] = False,
) -> int | None:
    """What two LoRAs are to each other, in words and exact numbers, per group and block.

    Cosines of ΔW in float64, over the modules that both have and with the rest as zero. Spelling,
    rank, family and dtype do not matter, and no index is needed.
    """
    from lorafind.search.compare import compare as side_by_side
    from lorafind.search.paths import path_of

    row = side_by_side(path_of(session.db, a), path_of(session.db, b), allow_pickle=allow_pickle)
    sink = session.sink
    if sink.mode in (Mode.JSON, Mode.JSONL, Mode.PATHS):
        sink.record((), row)
        return None
    if sink.mode is Mode.TABLE:
        words: Mapping[str, str] = row["words"]
        sink.rows([Column(topic, topic) for topic in words], [words], blocks=True)
    sink.rows(COLUMNS, _parts(row))
    return None


def _parts(row: Mapping[str, Any]) -> Iterator[Row]:
    everything = {"kind": "all", "name": "", "norm_a": row["a"]["norm"], "norm_b": row["b"]["norm"]}
    sums = {"only_a": len(row["a"]["only"]), "only_b": len(row["b"]["only"])}
    yield {**{k: row[k] for k in ("common", "cosine", "cosine_all", "ratio")}, **everything, **sums}
    for kind, key in (("component", "components"), ("group", "groups"), ("block", "blocks")):
        for part in row[key]:
            yield {"kind": kind, **part}
