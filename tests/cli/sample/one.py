"""One result."""

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column


@command
def one(session: Session) -> None:
    """Show one thing."""
    columns = (Column("name", "Name"), Column("cosine", "Cosine", digits=3), Column("no", "No"))
    session.sink.record(columns, {"name": "x", "cosine": 0.12345, "no": None, "all": [1, 2.5]})
