"""What follows the reading of files: models, relations, bases. Each step resumes by itself."""

from __future__ import annotations

from lorafind.bases import default, stored
from lorafind.index import classes
from lorafind.index.progress import Progress
from lorafind.index.relate import relate, unrelated
from lorafind.index.store import Store


def unfinished(store: Store) -> bool:
    """True where LoRAs have come since the last :func:`finish`."""
    return unrelated(store)


def finish(store: Store, watch: Progress, deep: bool | None = None) -> int:
    """Name unknown models, prove relations, fit bases; returns how many relations are new.

    deep: as for :func:`lorafind.index.relate.relate`.
    """
    classes.settle(store)
    found = relate(store, watch, deep)
    rows = store.conn.execute("SELECT DISTINCT architecture FROM loras").fetchall()
    architectures = {kind for (architecture,) in rows for kind in classes.kinds(architecture)}
    for architecture in sorted(architectures):
        watch.stage(f"Basis of {architecture}", 0, 0)
        stored.refresh(store, architecture)
        default.take(store, architecture, watch)
    if store.basis_ids():
        # Imported late: only bases over other features than style read files.
        from lorafind.bases.use import catch_up

        catch_up(store, watch)
    for basis in store.basis_ids():
        owner = store.conn.execute(
            "SELECT architecture, kind FROM bases WHERE id = ?", (basis,)
        ).fetchone()
        if owner[1] == "collection" and owner[0] not in architectures:
            with store.batch():
                store.drop_basis(basis)
    return found
