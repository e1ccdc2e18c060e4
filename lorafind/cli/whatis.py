"""``lorafind whatis``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, Targets, command, targets
from lorafind.cli.output import Column, Mode, nearby

COLUMNS = (
    Column("path", "File", nearby),
    Column("outcome", "Outcome"),
    Column("architecture", "Architecture"),
    Column("family", "Family"),
    Column("rank", "Rank"),
    Column("name", "Name"),
    Column("text", "Text"),
)
PEOPLE = (
    Column("File", "File", nearby),
    *(Column(title, title) for title in ("What", "Says", "Copies", "Related", "Style", "Likely")),
)


@command
def whatis(
    session: Session,
    names: Targets,
    count: Annotated[
        int, typer.Option("-k", "--count", min=0, help="Neighbours in style per file.")
    ] = 3,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt targets.")
    ] = False,
) -> int | None:
    """What a file is, what it is a copy, cast, part, resize or kin of, and what it is like.

    A file of the index is answered from the index; another one is read and proved against its
    likely relatives. Where the file names no base model or trigger words, those of its relatives
    and of its nearest in style are named as guesses, with their source.
    """
    from lorafind.cli.index import BROKEN
    from lorafind.index.problem import IndexProblem
    from lorafind.index.store import Store
    from lorafind.search.telling import text, topics
    from lorafind.search.whatis import whatis as look

    code: int | None = None
    people = session.sink.mode is Mode.TABLE
    with Store.open(session.db) as store:

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal code
            for target in targets(names):
                try:
                    answer = look(store, target, count, allow_pickle)
                except IndexProblem as error:
                    session.sink.warn(str(error))
                    code = Code.PARTIAL
                    continue
                if answer.outcome in BROKEN or answer.outcome == "pickle":
                    code = Code.PARTIAL
                if people:
                    yield {"File": answer.path, **topics(answer)}
                else:
                    yield {**answer.to_json(), "text": text(answer)}

        if people:
            session.sink.rows(PEOPLE, rows(), blocks=True)
        else:
            session.sink.rows(COLUMNS, rows())
    return code
