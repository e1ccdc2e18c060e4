"""``lorafind groups``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.groups.sort import Group

COLUMNS = (
    Column("path", "Most central", nearby),
    Column("group", "Group", "d", "right"),
    Column("loras", "LoRAs", "d", "right"),
    Column("families", "Families", "d", "right"),
    Column("spread", "Spread", ".3f", "right"),
    Column("outliers", "Outliers", "d", "right"),
    Column("trigger_words", "Trigger words"),
    Column("architecture", "Architecture"),
)
MEMBERS = (
    Column("path", "File", nearby),
    Column("group", "Group", "d", "right"),
    Column("role", "Role"),
    Column("score", "Score", ".3f", "right"),
    Column("architecture", "Architecture"),
)


@command
def groups(
    session: Session,
    number: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--groups",
            min=1,
            help="So many groups per architecture, by k-means; without it as many as are dense.",
            show_default=False,
        ),
    ] = None,
    least: Annotated[
        int,
        typer.Option(min=2, help="Without -k: a group has at least so many families of LoRAs."),
    ] = 3,
    arch: Annotated[
        str, typer.Option(help="Only LoRAs of this architecture.", show_default=False)
    ] = "",
    members: Annotated[
        bool, typer.Option("--members", help="One line per LoRA instead of one per group.")
    ] = False,
    link: Annotated[
        Path | None,
        typer.Option(
            help="Make this folder, with a folder of links per group; no file is moved. It must be "
            "new, empty or of an earlier run, which it then replaces.",
            show_default=False,
        ),
    ] = None,
) -> int | None:
    """The collection sorted into groups of one style, each architecture apart.

    The embeddings of the basis in use decide (see `lorafind basis`): k-means with -k, otherwise
    HDBSCAN, which leaves LoRAs that are near to no others in no group. Copies and other kin have
    one vote together. Per group: the most central LoRA; the spread, 1 − the mean score of the
    others to it; how many lie unusually far from it (below the quartiles' fence); trigger words
    more common here than elsewhere. Similar means a similar effect of training, of style and
    subject together.
    """
    from lorafind.groups.link import link as make_links
    from lorafind.groups.sort import Wishes
    from lorafind.groups.sort import groups as find_groups
    from lorafind.index.store import Store

    with Store.open(session.db) as store, Watch(session.sink) as watch:
        found = list(find_groups(store, Wishes(number, least, arch), watch))
    if link is not None:
        made = make_links(found, link)
        more = f" and {made.beside} to sidecars and previews" if made.beside else ""
        left = f"; {made.missing} LoRAs have no file that is there now" if made.missing else ""
        same = ", as they were" if made.same else ""
        session.sink.note(f"{made.links} links{more} in {link}{same}{left}.")
    if members:
        session.sink.rows(MEMBERS, _members(found))
        return None
    everything = session.sink.mode in (Mode.JSON, Mode.JSONL)
    shown = [group for group in found if group.number or everything]
    session.sink.rows(COLUMNS, (group.to_json() for group in shown))
    alone = sum(len(group.members) for group in found if not group.number)
    if alone:
        session.sink.note(f"{alone} LoRAs are in no group; --members lists them too.")
    if session.sink.mode is Mode.TABLE and shown:
        session.sink.note("`lorafind groups --members` lists the LoRAs of each group.")
    return None


def _members(found: list[Group]) -> Iterator[dict[str, Any]]:
    """One row per LoRA."""
    for group in found:
        whole = group.to_json()
        for member in whole.pop("members"):  # type: ignore[attr-defined]
            yield {**whole, **member}
