"""Fails as it is told."""

import errno
import os
from typing import Annotated

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.files.outcome import NotAnAdapter


@command
def fail(session: Session, how: Annotated[str, typer.Argument(help="How.")]) -> int | None:
    """Fail."""
    if how == "partly":
        return Code.PARTIAL
    if how == "pickle":
        raise NotAnAdapter("pickle", "a.pt is a pickle; it needs --allow-pickle.")
    if how == "pipe":
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    if how == "usage":
        raise typer.BadParameter("not like that")
    raise RuntimeError("the sky fell")
