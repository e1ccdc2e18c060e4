"""Finds the pairs of LoRAs that may be related, and proves them from their files, once.

Two searches follow each other, each up to a mark of its own per series. The first finds what may
hold one ΔW (``file``, ``tensors``, ``weights``; :mod:`lorafind.relations.buckets`), in a time that
grows about as the number of LoRAs. The second compares all with all, for every grade: where that
would take longer than PATIENCE, it waits until it is asked for (``deep``), and goes on block by
block after an interruption.

A pair that could not be proved (its files are offline) is kept as ``likely``, with the estimate
from the sketches, and tried again by the next run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import state
from lorafind.files.scan import join
from lorafind.index import rows, stars
from lorafind.index.classes import series_of
from lorafind.index.pairs import BLOCK, Work, all_pairs, near_pairs, seconds_of, waiting_pairs
from lorafind.index.progress import Progress
from lorafind.index.sketches import identities
from lorafind.index.stars import CROWD, LIKELY, Stars
from lorafind.index.store import Store
from lorafind.relations.buckets import COPIES
from lorafind.relations.candidates import RELATION_VERSION
from lorafind.relations.grades import Relation
from lorafind.signatures.constants import SIGNATURE_VERSION

if TYPE_CHECKING:
    from lorafind.formats.adapter import Adapter

__all__ = [
    "CROWD",
    "LIKELY",
    "Families",
    "identities",
    "mark_of",
    "open_as_read",
    "place_of",
    "relate",
    "to_row",
]

#: Seconds that the comparison of all pairs may take, by an estimate, without being asked for.
PATIENCE = 300.0
#: Up to so many LoRAs a series is compared in one block (some 4 kB of memory each).
WHOLE = 65_536
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


@dataclass(frozen=True)
class Outlook:
    """What of a series has not been compared in full.

    loras: in the series; left: of which so many have not been compared with all others; seconds:
    how long that would take, extrapolated from a measurement on some of them (an estimate, without
    the proofs of what is found).
    """

    key: str
    loras: int
    left: int
    seconds: float


def relate(store: Store, watch: Progress, deep: bool | None = None) -> int:
    """Prove every candidate pair that is new; returns how many relations were found.

    deep: compare all with all whatever it takes (True), never (False), or where the estimate is
    below PATIENCE (None); copies are looked for always.
    """
    found = 0
    for key in _open_series(store, deep):
        ids = np.sort(store.chunks.ids("identity", key))
        if not len(ids):
            continue
        if stars.fallen(store, key):
            with store.batch():
                for name in (mark_of(key), copies_mark(key), left_mark(key), stars.name_of(key)):
                    store.conn.execute("DELETE FROM meta WHERE key = ?", (name,))
        with _Prover(store, key, ids) as prover:
            found += _copies(store, key, ids, prover, watch)
            start = int(store.get_meta(mark_of(key), 0))
            left = int((ids > start).sum())
            if not left:
                continue
            deep_now = seconds_of(store, key, ids, left) <= PATIENCE if deep is None else deep
            if deep_now:
                found += _everything(store, key, ids, prover, watch)
            else:
                with store.batch():
                    store.set_meta(left_mark(key), int(ids[-1]))
    _store_families(store)
    return found


def _copies(store: Store, key: str, ids: np.ndarray, prover: _Prover, watch: Progress) -> int:
    """Look for LoRAs of one ΔW among those that no search has seen, up to its mark."""
    start = max(int(store.get_meta(name, 0)) for name in (mark_of(key), copies_mark(key)))
    found = 0
    again = list(waiting_pairs(store, ids))
    if again:
        watch.stage("Proving relations", len(again), 0)
        found += prover.prove(again, watch)
    if not all(prover.stars.used.values()):
        # What was left out by an unproved holder is looked at with what is proved now.
        start = 0
        prover.forget_waiting()
    new = int((ids > start).sum())
    if new:
        watch.stage("Looking for copies", new, 0)
        for work, seen in near_pairs(store, key, ids, start, prover.stars):
            found += prover.prove(work)
            watch.advance(seen, 0)
    with store.batch():
        stars.save(store, key, prover.stars)
        store.set_meta(copies_mark(key), int(ids[-1]))
    return found


def _everything(store: Store, key: str, ids: np.ndarray, prover: _Prover, watch: Progress) -> int:
    """Compare what is above the mark with all that is older, block by block."""
    found = 0
    new = ids[ids > int(store.get_meta(mark_of(key), 0))]
    # What fits is one block, so that of all pairs the most alike are proved first.
    size = BLOCK if len(ids) > WHOLE else len(new)
    if len(new) > size:
        watch.stage("Comparing all LoRAs", len(new), 0)
    for first in range(0, len(new), size):
        block = new[first : first + size]
        work = list(all_pairs(store, key, block, prover.stars, whole=size == len(new)))
        if len(new) > size:
            found += prover.prove(work)
            watch.advance(len(block), 0)
        else:
            watch.stage("Proving relations", len(work), 0)
            found += prover.prove(work, watch)
        with store.batch():
            stars.save(store, key, prover.stars)
            store.set_meta(mark_of(key), int(block[-1]))
    return found


def unrelated(store: Store) -> bool:
    """True where :func:`relate` has something to do without being asked for more."""
    return bool(_open_series(store))


def outlook(store: Store) -> list[Outlook]:
    """The series that have been searched for copies only, each with what a full comparison takes.

    Measures on a few thousand sketches each; empty where everything has been compared.
    """
    found = []
    for key, mark in _newest(store).items():
        start = int(store.get_meta(mark_of(key), 0))
        if mark <= start:
            continue
        ids = np.sort(store.chunks.ids("identity", key))
        left = int((ids > start).sum())
        if left:
            found.append(Outlook(key, len(ids), left, seconds_of(store, key, ids, left)))
    return found


def compared_in_full(store: Store) -> tuple[int, int]:
    """How many LoRAs have been compared with all others, and how many there are."""
    done = total = 0
    for key in _newest(store):
        ids = store.chunks.ids("identity", key)
        done += int((ids <= int(store.get_meta(mark_of(key), 0))).sum())
        total += len(ids)
    return done, total


def _open_series(store: Store, deep: bool | None = None) -> list[str]:
    """The identity series in which something is to be done."""
    waiting = store.conn.execute(
        "SELECT 1 FROM relations WHERE version = ? AND grade = ? "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = x AND presence = 'here') "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = y AND presence = 'here')",
        (RELATION_VERSION, LIKELY),
    ).fetchone()
    found = []
    for key, newest in sorted(_newest(store).items()):
        mark = int(store.get_meta(mark_of(key), 0))
        if not deep:
            mark = max(mark, int(store.get_meta(left_mark(key), 0)))
        if waiting or newest > mark or stars.fallen(store, key):
            found.append(key)
    return found


def _newest(store: Store) -> dict[str, int]:
    """Series → the newest LoRA in it."""
    newest: dict[str, int] = {}
    for architecture, number in store.conn.execute(
        "SELECT architecture, max(id) FROM loras GROUP BY 1"
    ):
        key = series_of(architecture)
        newest[key] = max(newest.get(key, 0), number)
    return newest


def mark_of(key: str) -> str:
    """The entry of ``meta`` that says up to which LoRA all pairs of a series were compared."""
    return f"related/{RELATION_VERSION}.{SIGNATURE_VERSION}/{key}"


def copies_mark(key: str) -> str:
    """The entry of ``meta`` that says up to which LoRA copies of a series were looked for."""
    return f"copies/{RELATION_VERSION}.{SIGNATURE_VERSION}/{key}"


def left_mark(key: str) -> str:
    """The entry of ``meta`` that says up to which LoRA comparing all pairs waits to be asked for.

    Without it a run that was broken off after the search for copies would seem to be finished.
    """
    return f"left/{RELATION_VERSION}.{SIGNATURE_VERSION}/{key}"


class _Prover:
    """Proves pairs of one series on all cores, and keeps what it found every few seconds.

    stars: which LoRA holds which, brought up to date by every proof.
    """

    def __init__(self, store: Store, key: str, ids: np.ndarray) -> None:
        self._store, self._key, self._ids = store, key, ids
        self._families = Families(_related(store))
        self.stars = Stars(store, key, ids)
        self._ready: list[rows.Relation] = []
        self._deadline = time.monotonic() + COMMIT_SECONDS
        self._cores = os.cpu_count() or 1

    def __enter__(self) -> Self:
        import torch

        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self._cores)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import torch

        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
        self._flush()

    def forget_waiting(self) -> None:
        """Begin anew with what is proved alone."""
        self.stars = Stars(self._store, self._key, self._ids)
        self.stars.used.clear()

    def prove(self, work: list[Work], watch: Progress | None = None) -> int:
        """Prove pairs in order; returns how many have a relation. All is kept at the end."""
        found = 0
        size = 4 * self._cores
        for start in range(0, len(work), size):
            batch = [item for item in work[start : start + size] if not self._needless(item)]
            places = {i: place_of(self._store, i) for item in batch for i in (item.x, item.y)}
            for row, item in zip(self._pool.map(_prove, batch, repeat(places)), batch, strict=True):
                self._ready.append(row)
                if row.grade == LIKELY and item.copies:
                    self.stars.add(row.x, row.y, True, True, waits=True)
                elif row.grade and row.grade != LIKELY:
                    self._families.join(row.x, row.y)
                    found += 1
                    if row.grade in COPIES:
                        self.stars.add(row.x, row.y, *row.numbers["dominates"])
            if watch is not None:
                watch.advance(min(size, len(work) - start), 0)
            if time.monotonic() > self._deadline:
                self._flush()
        self._flush()
        return found

    def _needless(self, item: Work) -> bool:
        """True for a pair that cannot be copies, in a large family."""
        return (
            item.weak
            and self._families.head(item.x) == self._families.head(item.y)
            and self._families.size(item.x) > CROWD
        )

    def _flush(self) -> None:
        if self._ready:
            with self._store.batch():
                self._store.put_relations(self._ready)
        self._ready, self._deadline = [], time.monotonic() + COMMIT_SECONDS


def _related(store: Store) -> Iterable[tuple[int, int]]:
    return store.conn.execute(
        "SELECT x, y FROM relations WHERE version = ? AND grade NOT IN ('', ?)",
        (RELATION_VERSION, LIKELY),
    ).fetchall()


def place_of(store: Store, lora: int) -> tuple[str, int, int] | None:
    """A path that holds the LoRA, with the size and mtime that it had when it was read."""
    row = store.conn.execute(
        "SELECT r.path, f.path, f.size, f.mtime_ns FROM files f JOIN roots r ON r.id = f.root "
        "WHERE f.lora = ? AND f.presence = 'here' ORDER BY f.is_link, f.id LIMIT 1",
        (lora,),
    ).fetchone()
    return (os.fsdecode(join(row[0], row[1])), row[2], row[3]) if row else None


def open_as_read(place: tuple[str, int, int] | None) -> Adapter | None:
    """The adapter in a place of :func:`place_of`; None if out of reach or changed since then."""
    from lorafind.formats.read import open_adapter

    if place is None:
        return None
    try:
        facts = state(place[0])
        if (facts.st_size, facts.st_mtime_ns) != place[1:]:
            return None
        # It was read before, so that its owner has allowed it.
        return open_adapter(place[0], allow_pickle=True)
    except (OSError, NotAnAdapter):
        return None


def _prove(item: Work, places: dict[int, tuple[str, int, int] | None]) -> rows.Relation:
    from lorafind.relations.verify import prove

    waiting = rows.Relation(
        item.x, item.y, RELATION_VERSION, LIKELY, numbers={"estimate": round(item.guess, 4)}
    )
    x, y = open_as_read(places[item.x]), open_as_read(places[item.y])
    if x is None or y is None:
        return waiting
    try:
        return to_row(item.x, item.y, prove(x, y))
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
    families = Families(_related(store))
    with store.batch():
        store.conn.execute("DELETE FROM families")
        store.conn.executemany("INSERT INTO families VALUES (?, ?)", families.items())
