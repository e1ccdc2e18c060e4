"""Scores of one LoRA against all others of its architecture, from embeddings or plain sketches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.bases.collection import SPACES, WEIGHTS
from lorafind.bases.stored import Basis, by_group, current, embed, members
from lorafind.formats import groups as group_bits
from lorafind.index.rows import Module, StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION


@dataclass(frozen=True)
class Query:
    """One LoRA to compare with all. lora: its id, None where it is not in the index."""

    lora: int | None
    architecture: str
    layout: int
    modules: Sequence[Module]
    signature: StoredSignature


@dataclass
class Scored:
    """Scores of n LoRAs: ids, layouts, families (a family is named by an id) and scores.

    LoRAs that share no group with the query, or none of those asked for, are not among them.
    """

    ids: np.ndarray
    layouts: np.ndarray
    families: np.ndarray
    scores: np.ndarray
    groups: tuple[str, ...] = field(default=())


def default_groups(bits: int) -> tuple[str, ...]:
    """A LoRA's groups of U-Net or transformer; its text encoders where it has no others."""
    has = group_bits.names(bits)
    return tuple(g for g in has if g in SPACES["model"]) or has


def by_basis(store: Store, basis: Basis, query: Query, wanted: Sequence[str]) -> Scored:
    """Cosines in the basis, over the groups that both LoRAs have; streams the embeddings."""
    parts = _parts(store, basis, query)
    own = set(group_bits.names(query.signature.groups)) & set(basis.groups) & set(wanted)
    ids, layouts, scores = [], [], []
    cache: dict[int, np.ndarray] = {}
    lacking: list[np.ndarray] = []
    model = set(basis.spaces["model"].groups) if "model" in basis.spaces else set()
    for block, rows in store.chunks.scan("embedding", basis.id):
        groups = rows["groups"]
        mixed = groups.min() != groups.max()
        for bits in np.unique(groups).tolist() if mixed else [int(groups[0])]:
            have = set(group_bits.names(bits))
            common = tuple(sorted(own & have))
            if not common:
                continue
            same = groups == bits if mixed else slice(None)
            if set(common) != have & model:
                lacking.append(block[same])
                continue
            # The stored unit vector is over just these groups.
            if bits not in cache:
                cache[bits] = basis.vectors(parts, common)[0].astype(np.float32)
            # Copies: a view would keep the whole block in memory.
            ids.append(block[same].copy())
            layouts.append(rows["layout"][same].copy())
            scores.append(rows["vector"][same] @ cache[bits])
    if lacking:
        rest = _by_parts(store, basis, parts, own, np.concatenate(lacking))
        for column, more in zip((ids, layouts, scores), rest, strict=True):
            column.append(more)
    if not ids:
        empty = np.empty(0, np.int64)
        return Scored(empty, empty, empty, np.empty(0), tuple(sorted(own)))
    numbers = np.concatenate(ids)
    return Scored(
        numbers,
        np.concatenate(layouts),
        _heads(store, numbers),
        np.concatenate(scores),
        tuple(sorted(own)),
    )


def _heads(store: Store, ids: np.ndarray) -> np.ndarray:
    """The family of every LoRA: its own id where it has no relatives."""
    rows = store.conn.execute("SELECT lora, family FROM families ORDER BY lora").fetchall()
    if not rows:
        return ids
    known, family = np.array(rows, np.int64).T
    where = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[where] == ids, family[where], ids)


def _parts(store: Store, basis: Basis, query: Query) -> np.ndarray:
    """p_g of the query, 1 × width: stored, or from its signature."""
    if query.lora is not None:
        row = store.chunks.get("parts", basis.id, query.lora)
        if row is not None:
            return np.asarray(row)[None]
    whole = current(store, basis.architecture)
    assert whole is not None and whole.id == basis.id
    style = {g: row[None] for g, row in by_group(query.signature).items()}
    return embed(whole, style, np.array([query.layout]))[1]


def _by_parts(
    store: Store, basis: Basis, parts: np.ndarray, own: set[str], which: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same for LoRAs whose groups differ from those compared: masked least squares."""
    facts: dict[int, tuple[int, int]] = {}
    for block, rows in store.chunks.scan("embedding", basis.id):
        picked = np.isin(block, which)
        facts.update(
            zip(
                block[picked].tolist(),
                zip(rows["groups"][picked].tolist(), rows["layout"][picked].tolist(), strict=True),
                strict=True,
            )
        )
    ids, layouts, scores = [], [], []
    for block, rows in store.chunks.scan("parts", basis.id):
        picked = np.isin(block, which)
        bits = np.array([facts[i][0] for i in block[picked].tolist()], np.int64)
        for value in np.unique(bits).tolist():
            same = np.flatnonzero(picked)[bits == value]
            common = sorted(own & set(group_bits.names(value)))
            theirs = basis.vectors(np.asarray(rows[same]), common)
            ids.append(block[same])
            layouts.append(np.array([facts[i][1] for i in block[same].tolist()]))
            scores.append(theirs @ basis.vectors(parts, common)[0])
    return np.concatenate(ids), np.concatenate(layouts), np.concatenate(scores)


def plain(store: Store, architecture: str, query: Query, wanted: Sequence[str]) -> Scored:
    """Without a basis: inner products of the sketches over the modules in common.

    A module has one vote, so that the number of common modules is the denominator.
    """
    ids, layouts, families = members(store, architecture)
    mine = {g: row.astype(np.float32) for g, row in by_group(query.signature).items()}
    my_scales = _scales(query.signature)
    names = _by_name(query.modules)
    counted: dict[int, Mapping[str, int]] = {}
    scores = np.full(len(ids), np.nan)
    row_of = {int(i): k for k, i in enumerate(ids)}
    for lora, found in store.signatures(SIGNATURE_VERSION, ids.tolist()):
        k = row_of[lora]
        layout = int(layouts[k])
        if layout not in counted:
            counted[layout] = _common(names, store.layout(layout)[1])
        theirs, scales = by_group(found), _scales(found)
        total = weight = 0.0
        for group in wanted:
            number = counted[layout].get(group, 0)
            if not number or group not in mine or group not in theirs:
                continue
            inner = float(mine[group] @ theirs[group].astype(np.float32))
            share = WEIGHTS[group] ** 2
            total += share * inner * my_scales[group] * scales[group] / number
            weight += share
        if weight:
            scores[k] = total / weight
    known = ~np.isnan(scores)
    return Scored(ids[known], layouts[known], families[known], scores[known], tuple(wanted))


def _scales(found: StoredSignature) -> dict[str, float]:
    return dict(zip(group_bits.names(found.groups), found.scales.tolist(), strict=True))


def _by_name(modules: Iterable[Module]) -> dict[str, Module]:
    return {m.name: m for m in modules if not m.vector}


def _common(mine: Mapping[str, Module], theirs: Iterable[Module]) -> dict[str, int]:
    """Group → number of modules that both have."""
    count: dict[str, int] = {}
    for module in theirs:
        if module.name in mine and not module.vector:
            count[module.group] = count.get(module.group, 0) + 1
    return count
