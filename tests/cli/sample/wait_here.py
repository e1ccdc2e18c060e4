"""Waits, to be interrupted."""

import time

from lorafind.cli.options import Session, command


@command
def wait_here(session: Session) -> None:
    """Wait."""
    session.sink.note("waiting")
    time.sleep(60)
