"""``lorafind basis push``."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column

COLUMNS = (Column("name", "Basis"), Column("url", "Commit"))


@command
def push(
    session: Session,
    file: Annotated[str, typer.Argument(help="A basis file, or a basis of your folder.")],
    repository: Annotated[str, typer.Argument(help="Where to: owner/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Into a private repository, made if need be.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="A branch, made if need be. Default: main.", show_default=False),
    ] = None,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Of the commit.", show_default=False)
    ] = "",
    token: Annotated[
        str | None,
        typer.Option(
            help="One that may write. Default: HF_TOKEN, or what `hf auth login` has saved.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Publish a basis on the Hugging Face Hub, in one commit.

    With it go config.json, its facts, and a card: what it is, from which data, under which licence,
    its evaluation as a table, plots (with the extra 'plot') and how to use it. Printed is the name
    under which it can be fetched, with the commit.
    """
    from lorafind.bases.file import read_facts
    from lorafind.bases.problem import BasisProblem
    from lorafind.hub.folder import local, unknown
    from lorafind.hub.names import push as publish

    path = local(file)
    if path is None:
        raise BasisProblem(unknown(file))
    with TemporaryDirectory(prefix="lorafind-") as scratch:
        pictures: list[Path] = []
        try:
            from lorafind.hub.pictures import draw

            pictures = draw(read_facts(path), Path(scratch))
        except ModuleNotFoundError as error:
            session.sink.note(f"The card has no plots, they need {error.name}:")
            session.sink.hint('pip install "lorafind[plot]"')
        made = publish(
            path,
            repository,
            private=private,
            token=token,
            revision=revision,
            message=message,
            pictures=pictures,
            bars=sys.stderr.isatty() and not session.sink.quiet,
        )
    session.sink.record(COLUMNS, {"name": made.name, "url": made.url})
