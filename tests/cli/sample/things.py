"""Results in rows: one per target."""

from typing import Annotated

import typer

from lorafind.cli.options import Session, Targets, command, targets
from lorafind.cli.output import Column

COLUMNS = (
    Column("path", "Path"),
    Column("score", "Score", ".2f", "right"),
    Column("size", "Size", lambda size: f"{size / 1000:g} kB", "right"),
    Column("kin", "Kin"),
    Column("same", "Same"),
)


@command
def things(
    session: Session,
    names: Targets,
    repeat: Annotated[int, typer.Option("--repeat", "-n", help="How often.")] = 1,
) -> None:
    """List things. The second sentence."""
    session.sink.note(f"db={session.db}")
    session.sink.detail("more")
    given = targets(names)
    session.sink.rows(
        COLUMNS,
        (
            {
                "path": name,
                "score": 1 / (place + 2),
                "size": 1500 * place,
                "kin": ["a", "b"][:place],
                "same": place == 0,
                "extra": None,
            }
            for _ in range(repeat)
            for place, name in enumerate(name for name in given if name != "nothing")
        ),
    )
