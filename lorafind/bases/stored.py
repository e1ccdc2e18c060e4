"""Bases in the index: the collection's own and those in use, and the embeddings made with them.

Series per basis id: ``embedding`` (:attr:`lorafind.bases.basis.Basis.record`), and ``parts``
(spaces' p_g side by side), which are read only for LoRAs that lack a group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lorafind.bases.basis import (
    COLLECTION,
    OWN,
    Basis,
    from_stored,
    to_stored,
)
from lorafind.bases.collection import (
    FEWEST,
    SAMPLE,
    SPACES,
    Sample,
    fit,
)
from lorafind.formats import groups as group_bits
from lorafind.index.rows import StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION, STYLE

#: A basis is fitted again when the collection has grown by this share.
GROWTH = 0.10
#: Version of what :func:`lorafind.bases.collection.fit` does; a basis of another is fitted again.
RULE = 2
_BLOCK = 256
#: LoRAs that are embedded in one transaction.
_AT_ONCE = 65_536


def open_stored(store: Store, name: str, light: bool = False) -> Basis | None:
    """A basis of the index by its id; light: without the components."""
    stored = store.basis(name, "/components" if light else None)
    if stored is None:
        return None
    layouts = None
    if stored.kind != COLLECTION:
        layouts = dict(store.conn.execute("SELECT digest, id FROM layouts").fetchall())
    return from_stored(stored, layouts)


def in_use(architecture: str) -> str:
    """The key of ``meta`` that names the basis in use; the collection's own where it is absent."""
    return f"basis:{architecture}"


def current(store: Store, architecture: str, light: bool = False, wanted: str = "") -> Basis | None:
    """The basis in use for an architecture; None where the collection is too small for one.

    light: without the components, which only a LoRA that is not embedded yet needs. wanted: the id
    or name of another basis of the index, or ``own``.
    """
    name = wanted or store.get_meta(in_use(architecture), OWN)
    row = _find(store, architecture, name)
    if row is None and not wanted:
        # The one that was chosen is gone, or of another version of the signatures.
        row = _find(store, architecture, OWN)
    if row is None:
        return None
    return open_stored(store, row[0], light)


def _find(store: Store, architecture: str, name: str) -> tuple[str] | None:
    """The newest basis of an architecture that a name stands for."""
    found: tuple[str] | None = store.conn.execute(
        "SELECT id FROM bases WHERE architecture = ?1 AND version = ?2 AND CASE WHEN ?3 = ?4 "
        "THEN kind = ?5 ELSE id = ?3 OR json_extract(facts, '$.name') = ?3 END "
        "ORDER BY made_ns DESC, id LIMIT 1",
        (architecture, SIGNATURE_VERSION, name, OWN, COLLECTION),
    ).fetchone()
    return found


def knows(store: Store, name: str) -> bool:
    """True for ``own`` and for id or name of a basis of the index."""
    if name == OWN:
        return True
    found = store.conn.execute(
        "SELECT 1 FROM bases WHERE version = ?1 AND "
        "(id = ?2 OR json_extract(facts, '$.name') = ?2)",
        (SIGNATURE_VERSION, name),
    ).fetchone()
    return found is not None


def members(store: Store, architecture: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, layouts, families) of every LoRA that may be of an architecture.

    A family is named by an id.
    """
    rows = store.conn.execute(
        "SELECT id, layout, coalesce(f.family, id) FROM loras LEFT JOIN families f ON f.lora = id "
        "JOIN signatures s ON s.lora = loras.id AND s.version = ? "
        "WHERE instr('-or-' || architecture || '-or-', '-or-' || ? || '-or-') ORDER BY id",
        (SIGNATURE_VERSION, architecture),
    )
    table = np.fromiter((i for row in rows for i in row), np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def refresh(store: Store, architecture: str, force: bool = False) -> None:
    """Fit the collection's basis where it is missing or has outgrown, and embed what is new.

    Published bases over style that the index holds get the new LoRAs as well.
    """
    ids, layouts, families = members(store, architecture)
    for (basis,) in store.conn.execute(
        "SELECT id FROM bases WHERE architecture = ? AND kind != ? AND version = ? "
        "AND coalesce(json_extract(facts, '$.feature'), 'style') = 'style'",
        (architecture, COLLECTION, SIGNATURE_VERSION),
    ).fetchall():
        published = open_stored(store, basis)
        assert published is not None
        _catch_up(store, published, ids, layouts)
    count = len(np.unique(families))
    old = _own(store, architecture)
    if count < FEWEST:
        if old is not None:
            with store.batch():
                store.drop_basis(old[0])
        return
    if old is None or force or abs(count - old[1]) > GROWTH * old[1] or old[2] != RULE:
        basis = _fit(store, architecture, ids, layouts, families)
        first = min(len(ids), _AT_ONCE)
        with store.batch():
            if old is not None:
                store.drop_basis(old[0])
            store.put_basis(to_stored(basis))
            embed_all(store, basis, ids[:first], layouts[:first])
        # What was not embedded when a run ends is by the next one.
        _catch_up(store, basis, ids, layouts)
        return
    kept = open_stored(store, old[0])
    assert kept is not None
    _catch_up(store, kept, ids, layouts)


def _catch_up(store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray) -> None:
    """Embed what is new, drop what is gone."""
    done = store.chunks.ids("embedding", basis.id)
    fresh = ~np.isin(ids, done)
    stale = np.setdiff1d(done, ids)
    if len(stale):
        with store.batch():
            store.chunks.delete(stale.tolist(), "embedding", basis.id)
            store.chunks.delete(stale.tolist(), "parts", basis.id)
    which, where = ids[fresh], layouts[fresh]
    # Some at a time: one transaction of a million would take the log to gigabytes.
    for start in range(0, len(which), _AT_ONCE):
        with store.batch():
            embed_all(
                store, basis, which[start : start + _AT_ONCE], where[start : start + _AT_ONCE]
            )


def _own(store: Store, architecture: str) -> tuple[str, int, int | None] | None:
    """Id of the collection's own basis, how many families it was fitted to, and by which rule."""
    row = store.conn.execute(
        "SELECT id, json_extract(facts, '$.families'), json_extract(facts, '$.rule') FROM bases "
        "WHERE architecture = ? AND kind = ? AND version = ?",
        (architecture, COLLECTION, SIGNATURE_VERSION),
    ).fetchone()
    return (row[0], int(row[1]), row[2]) if row else None


def _fit(
    store: Store, architecture: str, ids: np.ndarray, layouts: np.ndarray, families: np.ndarray
) -> Basis:
    _, where, sizes = np.unique(families, return_inverse=True, return_counts=True)
    weights = 1.0 / sizes[where]
    picked = np.arange(len(ids))
    if len(sizes) > SAMPLE:
        # One of every family, spread evenly over the families: the same at every run.
        first = np.unique(families, return_index=True)[1]
        picked = first[np.linspace(0, len(first) - 1, SAMPLE).astype(int)]
        weights = np.ones(len(ids))
    elif len(ids) > SAMPLE:
        order = np.lexsort((ids, where))
        rank = np.arange(len(ids)) - np.searchsorted(where[order], where[order])
        picked = np.sort(order[np.argsort(rank, kind="stable")[:SAMPLE]])
        _, again, kept = np.unique(families[picked], return_inverse=True, return_counts=True)
        weights[picked] = 1.0 / kept[again]
    styles = load_styles(store, ids[picked])
    spaces = {}
    for name, groups in SPACES.items():
        if any(g in styles for g in groups):
            heads = np.isin(
                np.arange(len(picked)), np.unique(families[picked], return_index=True)[1]
            )
            sample = Sample(styles, layouts[picked], weights[picked], heads)
            spaces[name] = fit(sample, groups)
    text = f"{architecture} {SIGNATURE_VERSION} {ids[picked].tolist()} {weights[picked].tolist()}"
    facts = {
        "rule": RULE,
        "families": len(sizes),
        "loras": len(ids),
        "sample": len(picked),
        "components": {name: space.size for name, space in spaces.items()},
        "signature_version": SIGNATURE_VERSION,
    }
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    seen = frozenset(bytes.fromhex(one) for one in _contents(store, ids[picked]).values())
    basis = Basis(f"own:{architecture}:{digest}", architecture, facts, spaces, seen=seen)
    # What is kept is float16; embeddings are made with what is kept.
    return from_stored(to_stored(basis))


def load_styles(store: Store, ids: Iterable[int]) -> dict[str, np.ndarray]:
    """Style sketches of some LoRAs: group → n × 32,768 int8, zeros where a LoRA lacks the group."""
    wanted = [int(i) for i in ids]
    row = {lora: i for i, lora in enumerate(wanted)}
    styles: dict[str, np.ndarray] = {}
    for lora, found in store.signatures(SIGNATURE_VERSION, wanted):
        for group, style in by_group(found).items():
            if group not in styles:
                styles[group] = np.zeros((len(wanted), STYLE), np.int8)
            styles[group][row[lora]] = style
    return styles


def by_group(found: StoredSignature) -> dict[str, np.ndarray]:
    """Group → its 32,768 int8."""
    return dict(zip(group_bits.names(found.groups), found.style, strict=True))


def embed_all(store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray) -> None:
    """Embed LoRAs of the index that the basis has no row for yet. Inside a batch."""
    for block, records, parts in embedded(store, basis, ids, layouts):
        store.chunks.append_many("embedding", basis.id, block, records)
        store.chunks.append_many("parts", basis.id, block, parts)


def embedded(
    store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, rows of ``embedding``, rows of ``parts``) of LoRAs of the index, block by block."""
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        seen = has_seen(store, basis, block)
        styles = load_styles(store, block)
        yield block, *embed(basis, styles, layouts[start : start + _BLOCK], seen)


def has_seen(store: Store, basis: Basis, ids: np.ndarray) -> np.ndarray | None:
    """Which LoRAs the basis was fitted to; None where that makes no difference."""
    if not basis.distinguishes:
        return None
    contents = _contents(store, ids)
    return np.array([bytes.fromhex(contents[i]) in basis.seen for i in ids.tolist()])


def _contents(store: Store, ids: np.ndarray) -> dict[int, str]:
    """LoRA id → content, hex."""
    rows = store.conn.execute(
        "SELECT id, content FROM loras WHERE id IN (SELECT value FROM json_each(?))",
        (json.dumps(ids.tolist()),),
    )
    return dict(rows.fetchall())


def embed(
    basis: Basis,
    styles: Mapping[str, np.ndarray],
    layouts: np.ndarray,
    seen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both series for n LoRAs from their sketches (see :attr:`Basis.record`)."""
    parts = basis.parts(styles, layouts)
    groups = np.zeros(len(layouts), np.uint8)
    for group, rows in styles.items():
        groups[rows.any(1)] |= group_bits.mask((group,))
    return records(basis, parts, groups, layouts, seen), parts


def records(
    basis: Basis,
    parts: np.ndarray,
    groups: np.ndarray,
    layouts: np.ndarray,
    seen: np.ndarray | None = None,
) -> np.ndarray:
    """Rows of the ``embedding`` series. groups: bit mask of every LoRA."""
    made = np.zeros(len(layouts), basis.record)
    made["layout"], made["groups"] = layouts, groups
    if seen is not None and "seen" in (basis.record.names or ()):
        made["seen"] = seen
    # A LoRA that has none of the basis's groups keeps a vector of zeros, and is never compared.
    model = basis.spaces["model"].groups if "model" in basis.spaces else ()
    for bits in np.unique(groups).tolist():
        same = groups == bits
        own = [g for g in group_bits.names(bits) if g in model]
        if own:
            calm = None if seen is None else seen[same]
            made["vector"][same] = basis.vectors(parts[same], own, calm)
    return made
