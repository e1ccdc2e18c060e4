"""Finds the pairs of LoRAs that may be related, and proves them from their files, once.

A pair that could not be proved (its files are offline) is kept as ``likely``, with the estimate
from the sketches, and tried again by the next run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.scan import join
from lorafind.index import rows
from lorafind.index.classes import comparable, series_of
from lorafind.index.progress import Progress
from lorafind.index.store import Store
from lorafind.relations.candidates import RELATION_VERSION, Identities, candidates, estimate
from lorafind.relations.grades import Relation
from lorafind.signatures.constants import SIGNATURE_VERSION

#: The grade of a candidate that waits for its proof.
LIKELY = "likely"
#: Within a family of more LoRAs than this, pairs that cannot be copies are not proved one by one.
CROWD = 16
#: Spread of log ‖A_m‖²/‖B_m‖² above which neither of two LoRAs of one rank is a copy of the other.
UNLIKE = 0.05

COMMIT_SECONDS = 2.0


class Families:
    """Connected components over LoRA ids (union by the smaller id)."""

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._parent: dict[int, int] = {}
        self._size: dict[int, int] = {}
        for a, b in pairs:
            self.join(a, b)

    def head(self, member: int) -> int:
        """The smallest id of the family."""
        while (parent := self._parent.get(member, member)) != member:
            self._parent[member] = self._parent.get(parent, parent)
            member = parent
        return member

    def size(self, member: int) -> int:
        """The number of LoRAs in the family."""
        return self._size.get(self.head(member), 1)

    def join(self, a: int, b: int) -> None:
        """Two LoRAs are related."""
        low, high = sorted((self.head(a), self.head(b)))
        if low != high:
            size = self.size(low) + self.size(high)
            self._parent[high] = low
            self._parent.setdefault(low, low)
            self._size[low] = size

    def items(self) -> list[tuple[int, int]]:
        """(LoRA, head) of every LoRA that has relatives."""
        return sorted((member, self.head(member)) for member in self._parent)


@dataclass
class _Work:
    """One pair to prove: LoRA ids x < y."""

    x: int
    y: int
    guess: float
    weak: bool


def relate(store: Store, watch: Progress) -> int:
    """Prove every candidate pair that is new; returns how many relations were found."""
    found = 0
    for key in _open_series(store):
        known, layouts = identities(store, key)
        if not len(known.ids):
            continue
        mark = int(store.get_meta(mark_of(key), 0))
        new = np.flatnonzero(known.ids > mark)
        work = list(_pairs(store, known, layouts, new))
        watch.stage("Proving relations", len(work), 0)
        found += _prove_all(store, work, watch)
        with store.batch():
            store.set_meta(mark_of(key), int(known.ids.max()))
    _store_families(store)
    return found


def unrelated(store: Store) -> bool:
    """True where some LoRA has not been compared with the others, or a pair waits for its proof."""
    return bool(_open_series(store))


def _open_series(store: Store) -> list[str]:
    """The identity series in which something is to be done."""
    waiting = store.conn.execute(
        "SELECT 1 FROM relations WHERE version = ? AND grade = ? "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = x AND presence = 'here') "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = y AND presence = 'here')",
        (RELATION_VERSION, LIKELY),
    ).fetchone()
    newest: dict[str, int] = {}
    for architecture, number in store.conn.execute(
        "SELECT architecture, max(id) FROM loras GROUP BY 1"
    ):
        key = series_of(architecture)
        newest[key] = max(newest.get(key, 0), number)
    return [
        key
        for key, number in sorted(newest.items())
        if waiting or number > int(store.get_meta(mark_of(key), 0))
    ]


def mark_of(key: str) -> str:
    """The entry of ``meta`` that says up to which LoRA a series has been compared."""
    return f"related/{RELATION_VERSION}.{SIGNATURE_VERSION}/{key}"


def identities(
    store: Store, key: str, only: Collection[int] | None = None
) -> tuple[Identities, dict[int, list[str]]]:
    """Everything that candidates need of one identity series, and layout → module names.

    only: the LoRAs that are wanted, None for all.
    """
    ids, records = [], []
    wanted = None if only is None else np.fromiter(only, np.int64, len(only))
    for block, rows_ in store.chunks.scan("identity", key):
        kept = slice(None) if wanted is None else np.isin(block, wanted)
        ids.append(np.array(block[kept]))
        records.append(np.array(rows_[kept]))
    if not any(map(len, ids)):
        empty = np.empty(0, np.int64)
        return Identities(empty, empty, np.empty(0), np.empty(0), []), {}
    order = np.argsort(np.concatenate(ids))
    numbers = np.concatenate(ids)[order]
    record = np.concatenate(records)[order]
    facts = {
        lora: (layout, np.frombuffer(norms, "<f4"))
        for lora, layout, norms in store.conn.execute(
            "SELECT id, layout, norms FROM loras WHERE ?1 IS NULL "
            "OR id IN (SELECT value FROM json_each(?1))",
            (None if only is None else json.dumps(sorted(only)),),
        )
    }
    layouts = np.array([facts[int(i)][0] for i in numbers], np.int64)
    names = {int(k): [m.name for m in store.layout(int(k))[1]] for k in np.unique(layouts).tolist()}
    modules = [facts[int(i)][1] for i in numbers]
    return Identities(numbers, layouts, record["sketch"], record["norms"], modules), names


def _pairs(
    store: Store, known: Identities, layouts: dict[int, list[str]], new: np.ndarray
) -> Iterator[_Work]:
    """Pairs to prove, the most alike first."""
    done = {(int(x), int(y)) for x, y in store.checked_pairs(RELATION_VERSION)}
    waiting = {(r.x, r.y) for r in store.relations(RELATION_VERSION) if r.grade == LIKELY}
    position = {int(i): k for k, i in enumerate(known.ids)}
    pairs = {
        (int(known.ids[j]), int(known.ids[i]))
        for block in candidates(known, layouts, new)
        for i, j in block.tolist()
    }
    pairs = {(min(p), max(p)) for p in pairs} - done
    pairs |= {p for p in waiting if p[0] in position and p[1] in position}
    models = dict(store.conn.execute("SELECT id, architecture FROM loras"))
    pairs = {p for p in pairs if comparable(models[p[0]], models[p[1]])}
    ranks = dict(store.conn.execute("SELECT id, ranks FROM loras"))
    work = []
    for x, y in pairs:
        i, j = position[x], position[y]
        work.append(
            _Work(
                x,
                y,
                estimate(known, layouts, i, j),
                ranks[x] == ranks[y] and _unlike(known, layouts, i, j),
            )
        )
    yield from sorted(work, key=lambda w: (-abs(w.guess), w.x, w.y))


def _unlike(known: Identities, layouts: dict[int, list[str]], i: int, j: int) -> bool:
    """True where the norms of the modules rule out that one is a copy or a part of the other."""
    a, b = int(known.layouts[i]), int(known.layouts[j])
    x, y = known.modules[i], known.modules[j]
    if a != b:
        where = {name: k for k, name in enumerate(layouts[a])}
        common = [(where[name], k) for k, name in enumerate(layouts[b]) if name in where]
        if len(common) < 2:
            return False
        left, right = np.array(common).T
        x, y = x[left], y[right]
    logs = np.log(x.astype(np.float64)) - np.log(y.astype(np.float64))
    return float(logs.std()) > UNLIKE


def _prove_all(store: Store, work: list[_Work], watch: Progress) -> int:
    import torch

    families = Families((r.x, r.y) for r in store.relations(RELATION_VERSION) if r.grade != LIKELY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = 0
    ready: list[rows.Relation] = []
    deadline = time.monotonic() + COMMIT_SECONDS
    cores = os.cpu_count() or 1
    try:
        with ThreadPoolExecutor(cores) as pool:
            for start in range(0, len(work), 4 * cores):
                batch = []
                for item in work[start : start + 4 * cores]:
                    same = families.head(item.x) == families.head(item.y)
                    if not (item.weak and same and families.size(item.x) > CROWD):
                        batch.append(item)
                places = {i: place_of(store, i) for item in batch for i in (item.x, item.y)}
                for row in pool.map(_prove, batch, repeat(places)):
                    ready.append(row)
                    if row.grade and row.grade != LIKELY:
                        families.join(row.x, row.y)
                        found += 1
                watch.advance(min(4 * cores, len(work) - start), 0)
                if time.monotonic() > deadline:
                    _keep(store, ready)
                    ready, deadline = [], time.monotonic() + COMMIT_SECONDS
    finally:
        torch.set_num_threads(threads)
        _keep(store, ready)
    return found


def _keep(store: Store, ready: list[rows.Relation]) -> None:
    if ready:
        with store.batch():
            store.put_relations(ready)


def place_of(store: Store, lora: int) -> tuple[str, int, int] | None:
    """A path that holds the LoRA, with the size and mtime that it had when it was read."""
    row = store.conn.execute(
        "SELECT r.path, f.path, f.size, f.mtime_ns FROM files f JOIN roots r ON r.id = f.root "
        "WHERE f.lora = ? AND f.presence = 'here' ORDER BY f.is_link, f.id LIMIT 1",
        (lora,),
    ).fetchone()
    return (os.fsdecode(join(row[0], row[1])), row[2], row[3]) if row else None


def _prove(item: _Work, places: dict[int, tuple[str, int, int] | None]) -> rows.Relation:
    from lorafind.formats.read import open_adapter
    from lorafind.relations.verify import prove

    waiting = rows.Relation(
        item.x, item.y, RELATION_VERSION, LIKELY, numbers={"estimate": round(item.guess, 4)}
    )
    adapters = []
    for number in (item.x, item.y):
        place = places[number]
        try:
            if place is None:
                return waiting
            facts = os.stat(place[0])
            if (facts.st_size, facts.st_mtime_ns) != place[1:]:
                return waiting
            # It was read before, so that its owner has allowed it.
            adapters.append(open_adapter(place[0], allow_pickle=True))
        except (OSError, NotAnAdapter):
            return waiting
    try:
        return to_row(item.x, item.y, prove(adapters[0], adapters[1]))
    except (OSError, NotAnAdapter):
        return waiting


def to_row(x: int, y: int, relation: Relation | None) -> rows.Relation:
    """A proof as a row; x < y."""
    if relation is None:
        return rows.Relation(x, y, RELATION_VERSION)
    direction = {"x": 1, "y": -1, None: 0}[relation.larger]
    return rows.Relation(
        x,
        y,
        RELATION_VERSION,
        relation.grade,
        direction,
        [step.words for step in relation.steps],
        relation.to_json(),
    )


def _store_families(store: Store) -> None:
    families = Families((r.x, r.y) for r in store.relations(RELATION_VERSION) if r.grade != LIKELY)
    with store.batch():
        store.conn.execute("DELETE FROM families")
        store.conn.executemany("INSERT INTO families VALUES (?, ?)", families.items())
