"""What a user names → a path, with the index only where there is no such file."""

from __future__ import annotations

import os
from pathlib import Path


def path_of(db: Path | None, target: str) -> str:
    """The path of a target: itself where something is there, else a file of the index.

    db: the index, None for the default one. What nobody knows stays as it is: who opens it will say
    that it is not there. Raises NoSuchTarget where the name fits several files of the index.
    """
    path = os.path.expanduser(target)
    if os.path.lexists(path):
        return path
    from lorafind.index.opening import location

    if not location(db).exists():
        return path
    from lorafind.index.store import Store
    from lorafind.search.targets import find

    with Store.open(db) as store:
        hit = find(store, target)
    return path if hit is None else hit.path
