"""The pairs of a series that are to be proved: what may be copies, or whatever may be related."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lorafind.index.classes import comparable
from lorafind.index.sketches import Layouts, blocks, described, identities, joined
from lorafind.index.stars import CROWD, LIKELY, Stars
from lorafind.index.store import Store
from lorafind.relations.buckets import Near, points, possible
from lorafind.relations.candidates import RELATION_VERSION, Identities, candidates, estimate

#: LoRAs whose pairs with all older ones are found, and proved, before the next.
BLOCK = 8192
#: Spread of log ‖A_m‖²/‖B_m‖² above which neither of two LoRAs of one rank is a copy of the other.
UNLIKE = 0.05
#: Below so many pairs the full comparison takes seconds, and nothing is measured.
MEASURED_ABOVE = 200_000_000
_SAMPLE = 4096
_STEP = 1024


@dataclass
class Work:
    """One pair to prove: LoRA ids x < y.

    guess: the sketched cosine; weak: they cannot be copies; copies: they are looked at as copies.
    """

    x: int
    y: int
    guess: float
    weak: bool = False
    copies: bool = False


def waiting_pairs(store: Store, ids: np.ndarray) -> Iterator[Work]:
    """Pairs of a series that wait for their proof and whose files are there."""
    rows = store.conn.execute(
        "SELECT x, y, json_extract(numbers, '$.estimate') FROM relations "
        "WHERE version = ? AND grade = ? "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = x AND presence = 'here') "
        "AND EXISTS (SELECT 1 FROM files WHERE lora = y AND presence = 'here') ORDER BY x, y",
        (RELATION_VERSION, LIKELY),
    ).fetchall()
    both = np.array([row[:2] for row in rows], np.int64).reshape(-1, 2)
    ours = np.asarray(np.isin(both, ids).all(1))
    for (x, y, guess), wanted in zip(rows, ours.tolist(), strict=True):
        if wanted:
            yield Work(x, y, guess)


def near_pairs(
    store: Store, key: str, ids: np.ndarray, start: int, stars: Stars
) -> Iterator[tuple[list[Work], int]]:
    """Pairs that may hold one ΔW, of which one is above ``start``; how many LoRAs were seen.

    Between two answers the caller proves and tells ``stars``, so that of a crowd each is compared
    with its holders first, and with the others only if none holds it.
    """
    near = Near(_points(store, key, ids))
    fresh = near.order[ids[near.order] > start]
    turn = np.full(len(ids), -1)
    turn[fresh] = np.arange(len(fresh))
    for first in range(0, len(fresh), _STEP):
        crowded: list[tuple[int, np.ndarray]] = []
        pairs: list[np.ndarray] = []
        block = fresh[first : first + _STEP]
        for position, around in near.around(block):
            # Each pair once: with the one whose turn comes later.
            others = around[turn[around] < turn[position]]
            if len(around) > CROWD + 1:
                crowded.append((position, others))
                # All that are near one another agree on the first, whoever's turn is earlier.
                others = stars.leads(others, around)[:1]
                others = others[others != position]
            if len(others):
                pairs.append(np.stack([others, np.full(len(others), position)], 1))
        if pairs:
            yield _works(store, ids, np.concatenate(pairs)), 0
        for position, others in crowded:
            # A holder that has come meanwhile, or is among them, settles the others.
            for first_of_it in (True, False):
                others = others[~stars.settled(others, position)]
                if not len(others):
                    break
                rest = stars.leads(others, others) if first_of_it else others
                yield _works(store, ids, np.stack([rest, np.full(len(rest), position)], 1)), 0
        yield [], len(block)


def _points(store: Store, key: str, ids: np.ndarray) -> np.ndarray:
    """The coordinates of every LoRA of a series, in the order of ids."""
    found = np.empty((0, 0))
    for block, rows in store.chunks.scan("identity", key):
        made = points(rows)
        if not len(found):
            found = np.full((len(ids), made.shape[1]), np.inf)
        found[np.searchsorted(ids, block)] = made
    return found


def _works(store: Store, ids: np.ndarray, pairs: np.ndarray) -> list[Work]:
    """Pairs of positions (m × 2) that have not been looked at and that the norms allow."""
    x, y = np.sort(ids[pairs], 1).T
    which = np.unique(np.concatenate([x, y]))
    fresh = ~_done(store, x, y)
    facts = {
        lora: (architecture, layout, np.frombuffer(norms, "<f4"))
        for lora, architecture, layout, norms in store.conn.execute(
            "SELECT id, architecture, layout, norms FROM loras "
            "WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(which.tolist()),),
        )
    }
    used = {layout for _, layout, _ in facts.values()}
    names = {k: [m.name for m in store.layout(k)[1]] for k in used} if len(used) > 1 else {}
    found = []
    for a, b in zip(x[fresh].tolist(), y[fresh].tolist(), strict=True):
        (one, here, norms), (two, there, others) = facts[a], facts[b]
        differ = (names[here], names[there]) if here != there else None
        if comparable(one, two) and possible(norms, others, differ):
            found.append(Work(a, b, 1.0, copies=True))
    return found


def _done(store: Store, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which pairs x < y (ids) have been looked at, and do not wait."""
    found = np.zeros(len(x), bool)
    for start in range(0, len(x), _STEP):
        some = np.stack([x[start : start + _STEP], y[start : start + _STEP]], 1)
        rows = store.conn.execute(
            "SELECT j.key FROM json_each(?) j CROSS JOIN relations r "
            "ON r.x = json_extract(j.value, '$[0]') AND r.y = json_extract(j.value, '$[1]') "
            "WHERE r.version = ?",
            (json.dumps(some.tolist()), RELATION_VERSION),
        )
        found[[start + k for (k,) in rows]] = True
    return found


def all_pairs(
    store: Store, key: str, block: np.ndarray, stars: Stars, whole: bool
) -> Iterator[Work]:
    """Candidates between the LoRAs ``block`` (ids) and all with smaller ids, the most alike first.

    whole: everything is held in memory at once; else 4,096 of the others at a time.
    """
    work: list[Work] = []
    if whole:
        known, layouts = identities(store, key)
        new = np.flatnonzero(np.isin(known.ids, block))
        work += _candidates(store, known, layouts, new, stars, False)
    else:
        mine = identities(store, key, block.tolist())
        size = len(mine[0].ids)
        work += _candidates(store, *mine, np.arange(size), stars, False)
        for others in blocks(store, key, int(block[0])):
            both = joined(mine, others)
            work += _candidates(store, *both, np.arange(size), stars, True)
    yield from sorted(work, key=lambda w: (-abs(w.guess), w.x, w.y))


def _candidates(
    store: Store,
    known: Identities,
    layouts: Layouts,
    new: np.ndarray,
    stars: Stars,
    apart: bool,
) -> list[Work]:
    holders = stars.all_labels(known.ids)
    found = [
        np.array(pairs, np.int64)
        for pairs in candidates(known, layouts, new, apart=apart, holders=holders)
    ]
    if not found:
        return []
    pairs = np.concatenate(found)
    x, y = np.sort(known.ids[pairs], 1).T
    fresh = ~_done(store, x, y)
    pairs = pairs[fresh]
    facts = {
        lora: (architecture, ranks)
        for lora, architecture, ranks in store.conn.execute(
            "SELECT id, architecture, ranks FROM loras "
            "WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(np.unique(known.ids[pairs]).tolist()),),
        )
    }
    work = []
    for i, j in pairs.tolist():
        a, b = sorted((int(known.ids[i]), int(known.ids[j])))
        (one, ranks), (two, others) = facts[a], facts[b]
        if comparable(one, two):
            weak = ranks == others and _unlike(known, layouts, i, j)
            work.append(Work(a, b, estimate(known, layouts, i, j), weak))
    return work


@dataclass(frozen=True)
class Alone:
    """A LoRA that is not in the index. record: its identity (``constants.IDENTITY``); names and
    norms (‖ΔW_m‖²) of its modules, in one order."""

    record: np.ndarray
    names: list[str]
    norms: np.ndarray


def relatives(store: Store, key: str, alone: Alone) -> Iterator[tuple[int, float]]:
    """(LoRA, estimated cosine over the modules in common) of every candidate; block by block."""
    none = np.array([-1])
    one = Identities(
        none, none, alone.record["sketch"][None], alone.record["norms"][None], [alone.norms]
    )
    for others in blocks(store, key):
        known, layouts = joined((one, {-1: alone.names}), others)
        for pairs in candidates(known, layouts, np.array([0]), apart=True):
            for i, _ in pairs.tolist():
                yield int(known.ids[i]), estimate(known, layouts, i, 0)


def _unlike(known: Identities, layouts: Layouts, i: int, j: int) -> bool:
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


def seconds_of(store: Store, key: str, ids: np.ndarray, left: int) -> float:
    """Seconds that comparing ``left`` of the LoRAs with all would take: an estimate.

    Extrapolates the time for the pairs of a few thousand, taken evenly from the series; 0 where
    there is too little to be worth a measurement.
    """
    pairs = left * (len(ids) - left / 2)
    if pairs < MEASURED_ABOVE:
        return 0.0
    picked = ids[np.linspace(0, len(ids) - 1, _SAMPLE).astype(int)]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for block, rows in store.chunks.scan("identity", key):
        kept = np.isin(block, picked)
        found.append((np.array(block[kept]), np.array(rows[kept])))
    known, layouts = described(store, *(np.concatenate(part) for part in zip(*found, strict=True)))
    times = []
    for _ in range(2):
        began = time.perf_counter()
        for _pairs in candidates(known, layouts):
            pass
        times.append(time.perf_counter() - began)
    return min(times) * pairs / (len(known.ids) ** 2 / 2)
