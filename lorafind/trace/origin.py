"""What one file comes from: proved relations first, then the search for the parents of a merge."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import absolute
from lorafind.index.classes import comparable, series_of
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.relate import open_as_read, place_of
from lorafind.index.store import Store
from lorafind.search.relatives import Relative, of_file, of_indexed
from lorafind.search.targets import cards, find

if TYPE_CHECKING:
    from lorafind.formats.adapter import Adapter
    from lorafind.trace.fit import Verdict
    from lorafind.trace.numbers import Table
    from lorafind.trace.pursuit import Effort, Found
    from lorafind.trace.reading import Shelf

#: Relations that leave ΔW as it is, up to rounding and one factor: neither comes from the other.
SAME = ("file", "tensors", "weights", "cast", "scaled")
#: LoRAs whose factors are looked at for a factor sum.
FACTORS = 64
#: Relatives that are named beside the parents.
RELATED = 3
#: Kin of the LoRAs taken that are tried as well.
KIN = 4
#: The share of ‖ΔW‖² from which on a LoRA that is no proved parent is named: a cosine of 0.30,
#: beyond any chance; only its place in the descent is open.
LIKELY = 0.09
#: The sketch finds a part of so many standard deviations nearly always.
SURE = 1.65


@dataclass(frozen=True)
class Parent:
    """A LoRA that the file comes from.

    kind: ``sum`` or ``part`` (see :mod:`lorafind.trace.fit`), ``factor sum``, or the grade of a
    proved relation (``resized``, ``part of``, ``reweighted``). weight: of its ΔW; for a factor sum
    the ratio, which stands in both factors. sd: its standard error, an estimate, None where nothing
    was fitted. low, high: the range over modules (block weights). explained: the share of the
    file's ‖ΔW‖² that goes when this parent is left out of the sum.
    """

    path: str
    lora: int
    kind: str
    weight: float
    sd: float | None
    low: float
    high: float
    explained: float | None
    text: str = ""


@dataclass(frozen=True)
class Trace:
    """Where one file comes from.

    explained, left: shares of ‖ΔW‖² by all parents together (None where that is not a sum). lost:
    the share of the sum that a resize cut off. complete: nothing but rounding is left. limit: the
    weight below which a further parent (of this collection's median norm) may have been missed, an
    estimate. likely: LoRAs that explain much and are not proved, {path, lora, weight, explained}:
    they or trainings akin to them may be ingredients of a merge that lost something; weight and
    share are estimates. copies: paths that hold the same ΔW. related: alike, but not proved to be
    parents. unread: LoRAs that seemed worth a look but are out of reach.
    """

    path: str
    lora: int | None
    parents: list[Parent] = field(default_factory=list)
    explained: float | None = None
    left: float | None = None
    lost: float = 0.0
    complete: bool = False
    limit: float | None = None
    likely: list[dict[str, Any]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    related: list[dict[str, Any]] = field(default_factory=list)
    unread: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def trace(
    store: Store, target: str, allow_pickle: bool = False, watch: Progress | None = None
) -> Trace:
    """Where a file, or a LoRA of the index by name, comes from.

    Raises NoSuchTarget, and NotAnAdapter where the file is no LoRA; IndexProblem where an indexed
    LoRA cannot be read as it was indexed.
    """
    watch = watch or Silent()
    hit = find(store, target)
    if hit is not None and hit.lora is not None:
        return of_lora(store, hit.lora, hit.path, watch)
    if hit is not None and hit.status != "pickle":
        raise NotAnAdapter(hit.status, hit.reason)
    from lorafind.formats.read import open_adapter
    from lorafind.search.query import examine_file

    path = absolute(target) if hit is None else hit.path
    lora = examine_file(path, allow_pickle)
    known = store.find_lora(lora.content)
    if known is not None:
        return of_lora(store, known[0], path, watch)
    assert lora.identity is not None
    relatives = of_file(store, path, lora, allow_pickle)
    adapter = open_adapter(path, allow_pickle)
    return _trace(store, path, None, adapter, lora.architecture, lora.identity, relatives, watch)


def of_lora(
    store: Store,
    lora: int,
    path: str,
    watch: Progress,
    shelf: Shelf | None = None,
    effort: Effort | None = None,
) -> Trace:
    """The same of a LoRA of the index; ``path`` is only shown.

    shelf: opens the others; effort: None for that of a single file.
    """
    (architecture,) = store.conn.execute(
        "SELECT architecture FROM loras WHERE id = ?", (lora,)
    ).fetchone()
    relatives = of_indexed(store, lora)
    origin = _by_relation(store, path, lora, relatives)
    if origin is not None:
        return origin
    adapter = _open(store, lora)
    if adapter is None:
        raise IndexProblem(
            f"{path} is out of reach or has changed since it was indexed: run `lorafind index`."
        )
    identity = _identity(store, series_of(architecture), lora)
    return _trace(
        store, path, lora, adapter, architecture, identity, relatives, watch, shelf, effort
    )


def shelf_of(store: Store) -> Shelf:
    """Opens LoRAs of the index and keeps them at hand."""
    from lorafind.trace.reading import Shelf

    return Shelf(lambda number: _open(store, number))


def _identity(store: Store, key: str, lora: int) -> np.ndarray:
    for ids, rows in store.chunks.scan("identity", key):
        at = np.flatnonzero(ids == lora)
        if len(at):
            return np.array(rows[at[0]])
    raise IndexProblem("its signature is of another version of lorafind: run `lorafind index`.")


def _open(store: Store, lora: int) -> Adapter | None:
    """The adapter of an indexed LoRA, None where no file holds it as it was read."""
    return open_as_read(place_of(store, lora))


def _path(store: Store, lora: int) -> str:
    paths = cards(store, [lora])[lora].paths
    return paths[0] if paths else f"LoRA {lora}, which no file holds any more"


def _copies(store: Store, relatives: list[Relative]) -> list[int]:
    return [r.lora for r in relatives if r.relation is not None and r.relation.grade in SAME]


def _by_relation(
    store: Store, path: str, lora: int | None, relatives: list[Relative]
) -> Trace | None:
    """The proved relation that says what was done to which LoRA, None where there is none."""
    for found in sorted(relatives, key=lambda r: r.order):
        relation = found.relation
        if (
            relation is None
            or not relation.proved
            or relation.grade in SAME
            or relation.larger != "y"
        ):
            continue
        kind = "part of" if relation.grade == "part" else relation.grade
        where = _path(store, found.lora)
        c = relation.factor
        parent = Parent(where, found.lora, kind, c, None, c, c, 1.0, relation.text())
        copies = [_path(store, k) for k in _copies(store, relatives)]
        return Trace(path, lora, [parent], 1.0, 0.0, complete=True, copies=copies)
    return None


def _trace(
    store: Store,
    path: str,
    lora: int | None,
    adapter: Adapter,
    architecture: str,
    identity: np.ndarray,
    relatives: list[Relative],
    watch: Progress,
    shelf: Shelf | None = None,
    effort: Effort | None = None,
) -> Trace:
    origin = _by_relation(store, path, lora, relatives)
    if origin is not None:
        return origin
    from lorafind.features.sources import one_thread
    from lorafind.trace.blocks import by_modules
    from lorafind.trace.fit import decide
    from lorafind.trace.numbers import measure
    from lorafind.trace.pursuit import THOROUGH, pursue

    shelf = shelf or shelf_of(store)
    copies = _copies(store, relatives)
    # What was made of the file is not what it was made of.
    skip = {r.lora for r in relatives if r.relation is not None and r.relation.larger == "x"}
    skip |= {*copies, *([] if lora is None else [lora])}
    key = series_of(architecture)
    models = dict(store.conn.execute("SELECT id, architecture FROM loras"))
    unread: set[int] = set()

    def open_lora(number: int) -> Adapter | None:
        if not comparable(models[number], architecture):
            return None
        found = shelf.get(number)
        if found is None:
            unread.add(number)
        return found

    # A merge of the file looks like its parent; each is seen and taken out in its turn.
    for _ in range(4):
        # Many small products: the threads of BLAS would only wait for one another.
        with one_thread():
            found = pursue(
                adapter,
                identity,
                lambda: store.chunks.scan("identity", key),
                open_lora,
                skip,
                watch,
                effort or THOROUGH,
            )
            table = measure(adapter, found.adapters)
            verdict = decide(table)
            if not verdict.complete and not verdict.children:
                more = by_modules(adapter, found, table, lambda: watch.advance(1, 0))
                more = _with_kin(store, more, open_lora, skip)
                if more is not found:
                    measured = measure(adapter, more.adapters)
                    second = decide(measured)
                    if second.complete or len(second.weights) > len(verdict.weights):
                        found, verdict, table = more, second, measured
        if not verdict.children:
            break
        skip |= {found.ids[k] for k in verdict.children}
    parents = _parents(store, found, verdict)
    if not verdict.complete and found.ids:
        with one_thread():
            parents = _factor_sum(store, adapter, found) or parents
    if verdict.complete and len(parents) == 1 and verdict.lost <= 1e-6:
        copies.append(parents[0].lora)
        parents = []
    by_factors = any(p.kind == "factor sum" for p in parents)
    same = {p.lora: _copies(store, of_indexed(store, p.lora)) for p in parents}
    parents = [_also(store, p, same[p.lora]) for p in parents]
    named = {*copies, *same, *(k for several in same.values() for k in several)}
    likely = [] if verdict.complete or by_factors else _likely(store, found, table, named)
    return Trace(
        path,
        lora,
        parents,
        None if by_factors else verdict.explained if parents else 0.0,
        None if by_factors else verdict.left if parents else 1.0,
        verdict.lost,
        bool(parents) and (verdict.complete or by_factors),
        _limit(store, architecture, identity, found, verdict, by_factors),
        likely,
        [_path(store, k) for k in copies],
        _related(store, relatives, named | {row["lora"] for row in likely}),
        len(unread),
    )


def _also(store: Store, parent: Parent, same: list[int]) -> Parent:
    """The parent with the other files of its ΔW, any of which may have been the one."""
    if not same:
        return parent
    names = ", ".join(os.path.basename(_path(store, k)) for k in same[:RELATED])
    return replace(parent, text="; ".join(filter(None, [parent.text, f"the same as {names}"])))


def _with_kin(
    store: Store, found: Found, open_lora: Callable[[int], Adapter | None], skip: set[int]
) -> Found:
    """``found`` with the nearest kin of those taken, such as two states of one run.

    What the second adds to the first is little of ‖T‖, so that a pursuit passes it over.
    """
    kin: dict[int, float] = {}
    for number in found.ids:
        for other in of_indexed(store, number):
            relation = other.relation
            if relation is None or relation.grade in SAME or other.lora in skip:
                continue
            kin[other.lora] = max(kin.get(other.lora, 0.0), abs(relation.cosine))
    ids, adapters = list(found.ids), list(found.adapters)
    nearest = [k for k in sorted(kin, key=lambda k: -kin[k]) if k not in ids][:KIN]
    for number in nearest:
        adapter = open_lora(number)
        if adapter is not None:
            ids.append(number)
            adapters.append(adapter)
    return found if len(ids) == len(found.ids) else replace(found, ids=ids, adapters=adapters)


def _parents(store: Store, found: Found, verdict: Verdict) -> list[Parent]:
    rows = []
    for w in verdict.weights:
        words = []
        if w.low != w.high:
            words.append(f"block weights {w.low:.3g} to {w.high:.3g}")
        if verdict.lost > 1e-6:
            words.append(f"resized, which cut {verdict.lost:.1%} of the sum")
        if w.proof == "part":
            words.append("proved by itself; other parents are missing")
        number = found.ids[w.at]
        sd = None if w.low != w.high else w.sd
        where = _path(store, number)
        rows.append(
            Parent(
                where, number, w.proof, w.weight, sd, w.low, w.high, w.explained, "; ".join(words)
            )
        )
    return rows


def _factor_sum(store: Store, adapter: Adapter, found: Found) -> list[Parent]:
    from lorafind.trace.factorsum import factor_sum

    pool = dict(zip(found.ids, found.adapters, strict=True)) | found.listed
    numbers = list(pool)[:FACTORS]
    words = "in both factors, with cross terms"
    return [
        Parent(
            _path(store, numbers[r.at]),
            numbers[r.at],
            "factor sum",
            r.ratio,
            r.sd,
            r.ratio,
            r.ratio,
            None,
            words,
        )
        for r in factor_sum(adapter, [pool[k] for k in numbers])
    ]


def _likely(store: Store, found: Found, table: Table, named: set[int]) -> list[dict[str, Any]]:
    """See :class:`Trace`; the largest share first."""
    from lorafind.trace.fit import shares

    rows = [
        {
            "path": _path(store, number),
            "lora": number,
            "weight": float(c),
            "explained": float(share),
        }
        for number, c, share in zip(found.ids, *shares(table), strict=True)
        if number not in named and share >= LIKELY
    ]
    return sorted(rows, key=lambda row: -row["explained"])


def _limit(
    store: Store,
    architecture: str,
    identity: np.ndarray,
    found: Found,
    verdict: Verdict,
    by_factors: bool,
) -> float | None:
    """See :class:`Trace`; None where there is nothing to compare with."""
    from lorafind.trace.pursuit import LEAST

    norms = [
        norm
        for norm, other in store.conn.execute("SELECT norm, architecture FROM loras WHERE norm > 0")
        if comparable(other, architecture)
    ]
    if by_factors or not norms:
        return None
    size = float(np.sqrt((identity["norms"].astype(np.float64) ** 2).sum()))
    if verdict.complete:
        share = float(np.sqrt(verdict.rounding))
    else:
        share = max((found.sigmas + SURE) * found.noise, float(np.sqrt(LEAST * found.left)))
    return share * size / float(np.median(norms))


def _related(store: Store, relatives: list[Relative], parents: set[int]) -> list[dict[str, Any]]:
    """What is alike without a proof of descent, the most alike first."""
    alike = [
        (abs(r.relation.cosine), r.lora, r.relation.cosine)
        for r in relatives
        if r.relation is not None and not r.relation.proved and r.lora not in parents
    ]
    return [
        {"path": _path(store, number), "cosine": cosine}
        for _, number, cosine in sorted(alike, reverse=True)[:RELATED]
    ]
