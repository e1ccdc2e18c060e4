"""The identity series as candidates see it: whole, some LoRAs of it, or block by block."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

import numpy as np

from lorafind.index.store import Store
from lorafind.relations.candidates import Identities

#: Layout → names of its modules.
Layouts = dict[int, list[str]]


def identities(
    store: Store, key: str, only: Collection[int] | None = None
) -> tuple[Identities, Layouts]:
    """Everything that candidates need of one identity series, and layout → module names.

    only: the LoRAs that are wanted, None for all, about 4 kB of memory each.
    """
    ids, records = [], []
    wanted = None if only is None else np.fromiter(only, np.int64, len(only))
    for block, rows in store.chunks.scan("identity", key):
        kept = slice(None) if wanted is None else np.isin(block, wanted)
        ids.append(np.array(block[kept]))
        records.append(np.array(rows[kept]))
    if not any(map(len, ids)):
        empty = np.empty(0, np.int64)
        return Identities(empty, empty, np.empty(0), np.empty(0), []), {}
    return described(store, np.concatenate(ids), np.concatenate(records))


def blocks(
    store: Store, key: str, below: int | None = None
) -> Iterator[tuple[Identities, Layouts]]:
    """The LoRAs of a series, at most 4,096 at a time; below: only those with ids below it."""
    for ids, rows in store.chunks.scan("identity", key):
        kept = np.arange(len(ids)) if below is None else np.flatnonzero(ids < below)
        if len(kept):
            yield described(store, np.array(ids[kept]), np.array(rows[kept]))


def described(store: Store, ids: np.ndarray, record: np.ndarray) -> tuple[Identities, Layouts]:
    """Some rows of an identity series, ordered by id, with what ``loras`` knows of them."""
    order = np.argsort(ids)
    numbers, record = ids[order], record[order]
    facts = {
        lora: (layout, np.frombuffer(norms, "<f4"))
        for lora, layout, norms in store.conn.execute(
            "SELECT id, layout, norms FROM loras WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(numbers.tolist()),),
        )
    }
    layouts = np.array([facts[i][0] for i in numbers.tolist()], np.int64)
    names = {k: [m.name for m in store.layout(k)[1]] for k in np.unique(layouts).tolist()}
    modules = [facts[i][1] for i in numbers.tolist()]
    return Identities(numbers, layouts, record["sketch"], record["norms"], modules), names


def joined(
    a: tuple[Identities, Layouts], b: tuple[Identities, Layouts]
) -> tuple[Identities, Layouts]:
    """The LoRAs of a, then those of b."""
    one, two = a[0], b[0]
    return (
        Identities(
            np.concatenate([one.ids, two.ids]),
            np.concatenate([one.layouts, two.layouts]),
            np.concatenate([one.sketch, two.sketch]),
            np.concatenate([one.norms, two.norms]),
            one.modules + two.modules,
        ),
        {**a[1], **b[1]},
    )
