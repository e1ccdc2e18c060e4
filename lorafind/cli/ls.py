"""``lorafind ls``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby


def size_text(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


COLUMNS = (
    Column("path", "File", nearby),
    Column("architecture", "Architecture"),
    Column("family", "Family"),
    Column("rank", "Rank", justify="right"),
    Column("dtype", "Dtype"),
    Column("size", "Size", size_text, "right"),
    Column("name", "Name"),
    Column("trigger_words", "Trigger words"),
    Column("base_model", "Base model"),
    Column("status", "Status"),
    Column("reason", "Why"),
)


@command
def ls(
    session: Session,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Only what has all of these in its name, path or trigger words.", metavar="TEXT"
        ),
    ] = None,
    arch: Annotated[
        str, typer.Option(help="Only these architectures, with commas: sd1, sdxl, other, …")
    ] = "",
    family: Annotated[
        str, typer.Option(help="Only these families, with commas: lora, locon, loha, lokr, …")
    ] = "",
    rank: Annotated[str, typer.Option(help="Only LoRAs with modules of rank 16, 8-32, 64-.")] = "",
    status: Annotated[
        str,
        typer.Option(
            help="What is listed, with commas: lora; zero, invalid, checkpoint and other words "
            "for files that are no LoRA, refused for all of them; gone; offline; all."
        ),
    ] = "lora",
) -> None:
    """The index as a list: one row per path, the LoRAs that are there unless --status says more.

    Rank: a range where modules differ. Name, trigger words and base model are what the file and
    its sidecars say. Status: lora, or what kept the file out, with the reason; gone or offline for
    what is not there now.
    """
    from lorafind.index.store import Store
    from lorafind.search.ls import ALL, AWAY, REFUSED, Filters, listing, parse_ranks, words

    try:
        ranks = parse_ranks(rank) if rank else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--rank'") from error
    asked = {"architecture": _words(arch), "family": _words(family), "status": _words(status)}
    filters = Filters(
        asked["architecture"], asked["family"], ranks, asked["status"] or ("lora",), texts or ()
    )
    with Store.open(session.db) as store:
        if session.sink.rows(COLUMNS, listing(store, filters)):
            return
        fine = {"lora", REFUSED, ALL, *AWAY}
        for kind, known in words(store).items():
            meant = fine | {w.casefold() for name in known for w in (name, *re.split("[:|]", name))}
            for word in asked[kind]:
                if word.casefold() not in meant:
                    session.sink.note(_missing(kind, word, known))


def _words(text: str) -> Sequence[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _missing(kind: str, word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"Nothing here has the {kind} {word!r}; there is {', '.join(known) or 'nothing'}.{meant}"
