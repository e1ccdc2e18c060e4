"""The published basis that serves an architecture where the user has chosen none."""

from __future__ import annotations

from lorafind.bases.basis import OWN
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import GROWTH, in_use, members
from lorafind.index.progress import Progress
from lorafind.index.store import Store

#: Components of other artists reach the mean alone from about this many (planted collections).
ARTISTS = 250


def take(store: Store, architecture: str, watch: Progress) -> None:
    """Fetch lorafind's own recommendation, if there is one, and use it where it serves.

    A choice of the user's is never touched. The basis is tried again when the collection has grown
    by a tenth or the recommendation is another; without a connection the collection's own serves.
    """
    from lorafind.hub import registry

    entry = registry.default(architecture)
    if entry is None:
        return
    key = f"default:{architecture}"
    tried = store.get_meta(key, {})
    chosen = store.get_meta(in_use(architecture))
    if chosen is not None and chosen != tried.get("chosen"):
        return
    count = len(members(store, architecture)[0])
    if tried.get("sha256") == entry.sha256 and abs(count - tried["loras"]) <= GROWTH * count:
        return
    from lorafind.bases.use import use
    from lorafind.hub.names import resolve

    try:
        used = use(store, resolve(entry.repository, watch=watch), watch)
    except BasisProblem as error:
        watch.note(f"The recommended basis for {architecture} is not in use: {error}")
        return
    serves = used.serves
    if serves is None:
        serves = used.own_kept is None and used.artists >= ARTISTS
    mine = used.id if serves else OWN
    with store.batch():
        store.set_meta(in_use(architecture), mine)
        store.set_meta(key, {"sha256": entry.sha256, "loras": count, "chosen": mine})
    if serves:
        watch.note(
            f"{used.name} ({used.id}), which lorafind recommends for {architecture}, is now in "
            "use: `lorafind basis use own` goes back to the collection's own."
        )
