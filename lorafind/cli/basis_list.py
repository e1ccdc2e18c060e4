"""``lorafind basis list``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby


def short(name: str) -> str:
    """For people: twelve digits of a commit are enough, and any command takes them."""
    from lorafind.hub.address import PREFIX, parse

    if not name.startswith(PREFIX) or not parse(name).pinned:
        return nearby(name)
    return name[: name.rindex("@") + 13]


COLUMNS = (
    Column("name", "Basis", short),
    Column("architecture", "Architecture"),
    Column("feature", "Feature"),
    Column("components", "Components", "d", "right"),
    Column("loras", "LoRAs", "d", "right"),
    Column("artists", "Artists", "d", "right"),
    Column("where", "Where"),
    Column("in_use", "In use"),
)


@command
def list(session: Session) -> int | None:
    """The bases that are here, and the published ones that lorafind knows.

    Where: index, of an index; folder, the files of your folder (LORAFIND_BASES); cache, fetched
    from the Hub; registry, published and known to lorafind. In use: what similar compares in, for
    the LoRAs of that architecture; `basis use` changes it.
    """
    from lorafind.hub.known import known

    code: int | None = None

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal code
        for row in known(session.db):
            if "problem" in row:
                session.sink.warn(row["problem"])
                code = Code.PARTIAL
            else:
                yield row

    session.sink.rows(COLUMNS, rows())
    return code
