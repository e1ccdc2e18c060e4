"""``lorafind epochs``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command, targets
from lorafind.cli.output import Column, Mode, nearby

COLUMNS = (
    Column("path", "File", nearby),
    Column("series", "Series"),
    Column("at", "Epoch, step"),
    Column("norm", "‖ΔW‖", ".4g", "right"),
    Column("cosine", "To the last", justify="right"),
    Column("change", "Change", justify="right"),
    Column("proposal", "Proposal"),
    Column("reason", "Why"),
    Column("estimated", "Estimated"),
)
#: For people an estimate carries a mark instead.
PEOPLE = COLUMNS[:-1]


@command
def epochs(
    session: Session,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Only the series of these: files, names in the index, or - for a list on stdin.",
            metavar="TARGET",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=-1.0,
            max=1.0,
            help="An earlier file is proposed when its cosine to every one that is kept is below "
            "this.",
        ),
    ] = 0.9,
    kept: Annotated[
        bool, typer.Option("--kept", help="Only the files that are proposed for keeping.")
    ] = False,
) -> int | None:
    """Series of one training run in order, with a proposal of which files to keep.

    A series is what has one session id, or one name up to its epoch or step number and related
    weights. Proposed are the last file and, from there back, every one whose ΔW points really
    elsewhere: its cosine to each one that is kept is below --threshold. This is a rule of thumb (a
    file that differs in strength alone is not proposed, and no picture was looked at): nothing is
    deleted. Change: 1 − cosine to the file before. ~ marks estimates from the signatures, all
    other cosines are exact.
    """
    from lorafind.index.problem import IndexProblem
    from lorafind.index.store import Store
    from lorafind.search.epochs import KEEP
    from lorafind.search.epochs import epochs as find_series
    from lorafind.search.targets import find

    code = None
    with Store.open(session.db) as store:
        only: set[int] | None = None
        if names:
            only = set()
            for target in targets(names):
                try:
                    hit = find(store, target)
                except IndexProblem as error:
                    session.sink.warn(str(error))
                    code = Code.PARTIAL
                    continue
                if hit is None or hit.lora is None:
                    why = hit.reason if hit else "the index does not hold it as it is: index it"
                    session.sink.warn(f"{target}: {why}")
                    code = Code.PARTIAL
                    continue
                only.add(hit.lora)

        def rows() -> Iterator[Mapping[str, Any]]:
            for series in find_series(store, threshold, only):
                for row in series:
                    if not kept or row.proposal == KEEP:
                        yield row.to_json()

        people = session.sink.mode is Mode.TABLE
        found = session.sink.rows(
            PEOPLE if people else COLUMNS, map(_marked, rows()) if people else rows()
        )
    if found:
        session.sink.note(
            "This is a proposal by the direction of ΔW alone (see --help); nothing is deleted."
        )
    else:
        session.sink.note("No two LoRAs here are of one training run, as far as can be seen.")
    return code


def _marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers for people, with a mark where they are estimates."""
    return {
        **row,
        **{
            key: None
            if row[key] is None
            else f"{'~' if key in row['estimated'] else ''}{row[key]:.3f}"
            for key in ("cosine", "change")
        },
    }
