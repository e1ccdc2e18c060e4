"""Scores of one LoRA against all others of its architecture, from embeddings or plain sketches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.bases.basis import COLLECTION, Basis
from lorafind.bases.collection import SPACES, WEIGHTS
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import by_group, current, embed, embedded, members
from lorafind.formats import groups as group_bits
from lorafind.index.rows import Module, StoredSignature
from lorafind.index.store import Store
from lorafind.signatures.constants import SIGNATURE_VERSION

#: Cosine to a fitted LoRA from which a query counts as a copy of it. A few queries that are none
#: come as near in FontBench; counting them so changes no figure of the README by 0.1.
COPY = 0.99


@dataclass(frozen=True)
class Query:
    """One LoRA to compare with all.

    lora: its id, None where it is not in the index; content: SHA-256 hex; path: a file of it.
    """

    lora: int | None
    architecture: str
    layout: int
    modules: Sequence[Module]
    signature: StoredSignature
    content: str = ""
    path: str = ""


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


def by_basis(
    store: Store, basis: Basis, query: Query, wanted: Sequence[str], stored: bool = True
) -> Scored:
    """Scores in the basis, over the groups that both LoRAs have; streams the embeddings.

    stored: False for a basis that the index does not hold: the LoRAs are embedded as they come.
    """
    if not stored and basis.feature != "style":
        raise BasisProblem(
            f"The basis {basis.facts['name']} is over {basis.feature}, which every file has to be "
            "read for: `lorafind basis use` it first."
        )
    parts = _parts(store, basis, query, stored)
    own = set(group_bits.names(query.signature.groups)) & set(basis.groups) & set(wanted)
    seen = _seen(basis, query.content)
    if not seen and basis.kind == COLLECTION and basis.distinguishes:
        # A copy of a fitted LoRA carries the noise that the fit has seen, as its original does.
        # Which of the two holds is known at the end, and reading twice takes longer than both.
        both = [_Mine(basis, parts, True), _Mine(basis, parts, False)]
        (scored, nearest), (other, _) = _scan(store, basis, both, own, stored)
        return scored if nearest >= COPY else other
    return _scan(store, basis, [_Mine(basis, parts, seen)], own, stored)[0][0]


def _scan(
    store: Store, basis: Basis, mine: Sequence[_Mine], own: set[str], stored: bool
) -> list[tuple[Scored, float]]:
    """For each of ``mine``: scores over the groups ``own``, the highest among fitted LoRAs.

    The embeddings are read once.
    """
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    if stored:
        scan = store.chunks.scan("embedding", basis.id)
        blocks = ((block, rows, None) for block, rows in scan)
    else:
        ids, layouts, _ = members(store, basis.architecture)
        blocks = embedded(store, basis, ids, layouts)
    numbers: list[np.ndarray] = []
    where: list[np.ndarray] = []
    tallies = [_Tally() for _ in mine]
    lacking: list[tuple[np.ndarray, np.ndarray]] = []
    model = set(basis.spaces["model"].groups) if "model" in basis.spaces else set()
    for block, rows, made in blocks:
        # Rows are wide: one pass over them, not one for every question.
        groups = np.ascontiguousarray(rows["groups"])
        mixed = groups.min() != groups.max()
        for bits in np.unique(groups).tolist() if mixed else [int(groups[0])]:
            have = set(group_bits.names(bits))
            common = tuple(sorted(own & have))
            if not common:
                continue
            same = groups == bits if mixed else slice(None)
            whole = set(common) == have & model
            # Copies: a view would keep the whole block in memory.
            if not whole and made is None:
                kept = [np.array(rows[name][same]) for name in _facts(basis)]
                lacking.append((block[same].copy(), np.stack(kept, 1).astype(np.int64)))
                continue
            seen = rows["seen"][same] if basis.distinguishes else None
            for one, tally in zip(mine, tallies, strict=True):
                if whole:
                    # The stored vector is over just these groups.
                    tally.add(basis.scores(rows["vector"][same], one.vector(common)), seen)
                else:
                    assert made is not None
                    tally.add(one.against(made[same], common, seen), seen)
            numbers.append(block[same].copy())
            where.append(rows["layout"][same].copy())
    if lacking:
        ids, facts = (np.concatenate(column) for column in zip(*lacking, strict=True))
        order = np.argsort(ids)
        for block, layouts, found, seen in _by_parts(
            store, basis, mine, own, ids[order], facts[order]
        ):
            numbers.append(block)
            where.append(layouts)
            for scores, tally in zip(found, tallies, strict=True):
                tally.add(scores, seen)
    groups_of = tuple(sorted(own))
    if not numbers:
        empty = np.empty(0, np.int64)
        return [(Scored(empty, empty, empty, np.empty(0), groups_of), -1.0) for _ in mine]
    ids, layouts = np.concatenate(numbers), np.concatenate(where)
    heads = _heads(store, ids)
    return [
        (Scored(ids, layouts, heads, np.concatenate(t.scores), groups_of), t.nearest)
        for t in tallies
    ]


class _Tally:
    """Scores as they come, and the highest of LoRAs that were fitted."""

    def __init__(self) -> None:
        self.scores: list[np.ndarray] = []
        self.nearest = -1.0

    def add(self, scores: np.ndarray, seen: np.ndarray | None) -> None:
        """The next ones; seen: which were fitted."""
        self.scores.append(scores)
        if seen is not None:
            self.nearest = max(self.nearest, float(scores[seen != 0].max(initial=-1.0)))


def _facts(basis: Basis) -> list[str]:
    """What of a row of ``embedding`` is needed to score by parts."""
    return ["groups", "layout", *(["seen"] if basis.distinguishes else [])]


class _Mine:
    """The query in a basis: its vector over any groups, made once each."""

    def __init__(self, basis: Basis, parts: np.ndarray, seen: bool) -> None:
        self.basis, self.parts = basis, parts
        self._seen = np.array([seen])
        self._vectors: dict[tuple[str, ...], np.ndarray] = {}

    def vector(self, common: tuple[str, ...]) -> np.ndarray:
        """float32."""
        if common not in self._vectors:
            made = self.basis.vectors(self.parts, common, self._seen)[0]
            self._vectors[common] = made.astype(np.float32)
        return self._vectors[common]

    def against(
        self, parts: np.ndarray, common: tuple[str, ...], seen: np.ndarray | None
    ) -> np.ndarray:
        """Scores of LoRAs from their parts."""
        theirs = self.basis.vectors(parts, common, None if seen is None else seen != 0)
        return self.basis.scores(theirs, self.vector(common))


def _seen(basis: Basis, content: str) -> bool:
    return bool(content) and bytes.fromhex(content) in basis.seen


def _heads(store: Store, ids: np.ndarray) -> np.ndarray:
    """The family of every LoRA: its own id where it has no relatives."""
    rows = store.conn.execute("SELECT lora, family FROM families ORDER BY lora")
    table = np.fromiter((i for row in rows for i in row), np.int64).reshape(-1, 2)
    if not len(table):
        return ids
    known, family = table.T
    where = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[where] == ids, family[where], ids)


def _parts(store: Store, basis: Basis, query: Query, stored: bool) -> np.ndarray:
    """p_g of the query, 1 × width: stored, or from its signature or file."""
    if stored and query.lora is not None:
        row = store.chunks.get("parts", basis.id, query.lora)
        if row is not None:
            return np.asarray(row)[None]
    if basis.feature != "style":
        from lorafind.bases.use import parts_of_file

        return parts_of_file(basis, query.path)
    whole = basis
    if stored:
        again = current(store, basis.architecture, wanted=basis.id)
        assert again is not None
        whole = again
    style = {g: row[None] for g, row in by_group(query.signature).items()}
    return embed(whole, style, np.array([query.layout]))[1]


def _by_parts(
    store: Store,
    basis: Basis,
    mine: Sequence[_Mine],
    own: set[str],
    which: np.ndarray,
    facts: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray | None]]:
    """(ids, layouts, scores for each of ``mine``, seen) of LoRAs whose groups differ from those
    compared: masked least squares.

    which: their ids, ascending; facts: a row of :func:`_facts` for each.
    """
    for block, rows in store.chunks.scan("parts", basis.id):
        place = np.minimum(np.searchsorted(which, block), len(which) - 1)
        picked = np.flatnonzero(which[place] == block)
        table = facts[place[picked]]
        for value in np.unique(table[:, 0]).tolist():
            here = table[:, 0] == value
            same = picked[here]
            common = tuple(sorted(own & set(group_bits.names(value))))
            seen = table[here, 2] if basis.distinguishes else None
            theirs = np.asarray(rows[same])
            scores = [one.against(theirs, common, seen) for one in mine]
            yield block[same], table[here, 1], scores, seen


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
