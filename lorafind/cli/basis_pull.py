"""``lorafind basis pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafind.cli.basis_show import Offline, Token
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, nearby

COLUMNS = (
    Column("name", "Basis"),
    Column("path", "File", nearby),
    Column("size", "Size", lambda size: f"{size / 1e6:.1f} MB", "right"),
)


@command
def pull(
    session: Session,
    name: Annotated[
        str,
        typer.Argument(
            help="hf:owner/name or hf:owner/name@revision, or a basis that lorafind knows."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Copy it to this file or folder.", show_default=False),
    ] = None,
    offline: Offline = False,
    token: Token = None,
) -> None:
    """Fetch a basis from the Hugging Face Hub into its cache.

    Printed is its name with the commit, which always stands for these bytes, and its file. A
    download that was cut goes on where it was; the SHA-256 that the Hub states is checked, and a
    test vector inside the file is recomputed. Nothing but the basis and its config.json is fetched.
    """
    from lorafind.cli.watch import Watch
    from lorafind.hub.folder import copy, vacant
    from lorafind.hub.names import resolve

    target = vacant(output, name) if output else None
    with Watch(session.sink) as watch:
        found = resolve(name, offline=offline, token=token, watch=watch)
    path = copy(found.path, target) if target else found.path
    row = {"name": found.name, "path": path, "size": path.stat().st_size}
    session.sink.record(COLUMNS, row)
