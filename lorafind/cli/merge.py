"""``lorafind merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from lorafind.cli.exchanged import tell
from lorafind.cli.options import Session, command, targets
from lorafind.cli.watch import Watch


@command
def merge(
    session: Session,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Indexes to take in, or - for a list on stdin.",
            metavar="INDEX",
            show_default=False,
        ),
    ],
    relations: Annotated[
        bool,
        typer.Option("--relations/--no-relations", help="Prove relations and fit bases now."),
    ] = True,
) -> int | None:
    """Unite indexes: the shards of `index --shard`, or those of several machines.

    They are taken into the index of --db, which is made where there is none, and are only read
    themselves. Folders are united by path, files too (the newer reading holds), LoRAs by content;
    relations that are proved stay so. Nothing is ever taken out. Safe to interrupt and to repeat.
    """
    from lorafind.exchange.merge import opened, take_all
    from lorafind.index.opening import location
    from lorafind.index.store import Store

    # A source that cannot be used must not leave an empty index behind.
    with (
        opened(targets(sources), location(session.db)) as found,
        Store.open(session.db, "write") as store,
        Watch(session.sink) as watch,
    ):
        merged = take_all(store, found, relate=relations, progress=watch)
    tell(session, merged)
    return None
