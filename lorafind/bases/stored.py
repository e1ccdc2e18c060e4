"""A collection's own basis in the index: fitted, kept, and the embeddings made with it.

Parts of a basis (``basis_parts``), per space (``model``, ``text``) and group: ``components``
k × 32,768 float16, ``gram`` k × k, ``means`` layouts × k; per space ``layouts`` (ids, −1 first: the
pooled mean) and ``eigenvalues``. Series per basis id: ``embedding`` (:func:`record`), and ``parts``
(spaces' p_g side by side), which are read only for LoRAs that lack a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorafind.bases.collection import (
    FEWEST,
    SAMPLE,
    SPACES,
    Sample,
    Space,
    coordinates,
    fit,
    unit_rows,
)
from lorafind.formats import groups as group_bits
from lorafind.index.rows import StoredBasis, StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION, STYLE

#: A basis is fitted again when the collection has grown by this share.
GROWTH = 0.10
_BLOCK = 256


@dataclass
class Basis:
    """A basis ready for use. spaces: ``model`` and, where the collection has them, ``text``."""

    id: str
    architecture: str
    facts: Mapping[str, object]
    spaces: dict[str, Space]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of all spaces, in the order of ``parts``."""
        return tuple(g for space in self.spaces.values() for g in space.groups)

    @cached_property
    def record(self) -> np.dtype:
        """One row of the ``embedding`` series: bit mask of groups, layout, unit vector."""
        size = self.spaces["model"].size if "model" in self.spaces else 0
        return np.dtype([("groups", "u1"), ("layout", "<i4"), ("vector", "<f4", (size,))])

    @cached_property
    def width(self) -> int:
        """Numbers in a row of the ``parts`` series."""
        return sum(space.size * len(space.groups) for space in self.spaces.values())

    def parts(self, styles: Mapping[str, np.ndarray], layouts: np.ndarray) -> np.ndarray:
        """p_g of n LoRAs side by side, n × width float32.

        styles: group → n × 32,768 int8, rows of zeros where a LoRA lacks the group.
        """
        columns = []
        for space in self.spaces.values():
            for group in space.groups:
                if group not in styles:
                    columns.append(np.zeros((len(layouts), space.size), np.float32))
                    continue
                made = space.project(group, unit_rows(styles[group]))
                made -= np.array([space.centre(group, int(k)) for k in layouts])
                made[~styles[group].any(1)] = 0.0
                columns.append(made)
        return np.concatenate(columns, 1).astype(np.float32)

    def vectors(self, parts: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
        """Unit coordinates over some groups: the spaces side by side, n × Σ k."""
        found, start = [], 0
        for space in self.spaces.values():
            size = space.size * len(space.groups)
            block = parts[:, start : start + size].reshape(len(parts), len(space.groups), -1)
            start += size
            if any(group in wanted for group in space.groups):
                found.append(coordinates(space, block.astype(np.float64), wanted))
        if not found:
            return np.zeros((len(parts), 0))
        joined = np.concatenate(found, 1)
        length = np.linalg.norm(joined, axis=1, keepdims=True)
        return np.divide(joined, length, out=np.zeros_like(joined), where=length > 0)


def to_stored(basis: Basis) -> StoredBasis:
    """For the index."""
    parts: dict[str, np.ndarray] = {}
    for name, space in basis.spaces.items():
        layouts = sorted(space.means)
        parts[f"{name}/layouts"] = np.array(layouts, np.int64)
        parts[f"{name}/eigenvalues"] = space.eigenvalues
        for group in space.groups:
            parts[f"{name}/{group}/components"] = space.components[group].astype(np.float16)
            parts[f"{name}/{group}/gram"] = space.grams[group]
            parts[f"{name}/{group}/means"] = np.array([space.means[k][group] for k in layouts])
    return StoredBasis(
        basis.id, basis.architecture, "collection", SIGNATURE_VERSION, basis.facts, parts
    )


def from_stored(stored: StoredBasis) -> Basis:
    """Inverse of :func:`to_stored`; the components stay float16 until they are used."""
    spaces: dict[str, Space] = {}
    for name, groups in SPACES.items():
        present = tuple(g for g in groups if f"{name}/{g}/gram" in stored.parts)
        if not present:
            continue
        layouts = stored.parts[f"{name}/layouts"].tolist()
        means = {g: stored.parts[f"{name}/{g}/means"] for g in present}
        spaces[name] = Space(
            present,
            {
                g: c
                for g in present
                if (c := stored.parts.get(f"{name}/{g}/components")) is not None
            },
            {g: stored.parts[f"{name}/{g}/gram"] for g in present},
            {k: {g: means[g][row] for g in present} for row, k in enumerate(layouts)},
            stored.parts[f"{name}/eigenvalues"],
        )
    return Basis(stored.id, stored.architecture, stored.facts, spaces)


def current(store: Store, architecture: str, light: bool = False) -> Basis | None:
    """The basis in use for an architecture; None where the collection is too small for one.

    light: without the components, which only a LoRA that is not embedded yet needs.
    """
    for name in store.basis_ids(architecture):
        stored = store.basis(name, "/components" if light else None)
        if stored is not None and stored.version == SIGNATURE_VERSION:
            return from_stored(stored)
    return None


def members(store: Store, architecture: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, layouts, families) of every LoRA that may be of an architecture.

    A family is named by an id.
    """
    rows = store.conn.execute(
        "SELECT id, layout, coalesce(f.family, id) FROM loras LEFT JOIN families f ON f.lora = id "
        "JOIN signatures s ON s.lora = loras.id AND s.version = ? "
        "WHERE instr('|' || architecture || '|', '|' || ? || '|') ORDER BY id",
        (SIGNATURE_VERSION, architecture),
    ).fetchall()
    table = np.array(rows, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def refresh(store: Store, architecture: str, force: bool = False) -> None:
    """Fit the collection's basis where it is missing or has outgrown, and embed what is new."""
    ids, layouts, families = members(store, architecture)
    count = len(np.unique(families))
    old = _own(store, architecture)
    if count < FEWEST:
        if old is not None:
            with store.batch():
                store.drop_basis(old[0])
        return
    if old is None or force or abs(count - old[1]) > GROWTH * old[1]:
        basis = _fit(store, architecture, ids, layouts, families)
        with store.batch():
            for name in store.basis_ids(architecture):
                store.drop_basis(name)
            store.put_basis(to_stored(basis))
            _embed(store, basis, ids, layouts)
        return
    done = store.chunks.ids("embedding", old[0])
    fresh = ~np.isin(ids, done)
    stale = np.setdiff1d(done, ids)
    if fresh.any() or len(stale):
        kept = current(store, architecture)
        assert kept is not None
        with store.batch():
            store.chunks.delete(stale.tolist(), "embedding", kept.id)
            store.chunks.delete(stale.tolist(), "parts", kept.id)
            _embed(store, kept, ids[fresh], layouts[fresh])


def _own(store: Store, architecture: str) -> tuple[str, int] | None:
    """Id of the collection's own basis, and how many families it was fitted to."""
    row = store.conn.execute(
        "SELECT id, json_extract(facts, '$.families') FROM bases "
        "WHERE architecture = ? AND kind = 'collection' AND version = ?",
        (architecture, SIGNATURE_VERSION),
    ).fetchone()
    return (row[0], int(row[1])) if row else None


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
            sample = Sample(styles, layouts[picked], weights[picked])
            spaces[name] = fit(sample, groups)
    text = f"{architecture} {SIGNATURE_VERSION} {ids[picked].tolist()} {weights[picked].tolist()}"
    facts = {
        "families": len(sizes),
        "loras": len(ids),
        "sample": len(picked),
        "components": {name: space.size for name, space in spaces.items()},
        "signature_version": SIGNATURE_VERSION,
    }
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    basis = Basis(f"own:{architecture}:{digest}", architecture, facts, spaces)
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


def _embed(store: Store, basis: Basis, ids: np.ndarray, layouts: np.ndarray) -> None:
    for start in range(0, len(ids), _BLOCK):
        block = slice(start, start + _BLOCK)
        records, parts = embed(basis, load_styles(store, ids[block]), layouts[block])
        store.chunks.append_many("embedding", basis.id, ids[block], records)
        store.chunks.append_many("parts", basis.id, ids[block], parts)


def embed(
    basis: Basis, styles: Mapping[str, np.ndarray], layouts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both series for n LoRAs (see :attr:`Basis.record`)."""
    parts = basis.parts(styles, layouts)
    records = np.zeros(len(layouts), basis.record)
    records["layout"] = layouts
    model = SPACES["model"]
    for group, rows in styles.items():
        records["groups"][rows.any(1)] |= group_bits.mask((group,))
    for bits in np.unique(records["groups"]).tolist():
        same = records["groups"] == bits
        own = [g for g in group_bits.names(bits) if g in model]
        if own and "model" in basis.spaces:
            records["vector"][same] = basis.vectors(parts[same], own)
    return records, parts
