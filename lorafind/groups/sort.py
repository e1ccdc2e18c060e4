"""The LoRAs of an index sorted into groups of one style, by the embeddings that it stores.

Architectures are sorted apart, each in the basis in use. A family (LoRAs related by descent) has
one vote in what the groups are; its other members are then given a group each. No file is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from lorafind.bases.basis import Basis
from lorafind.bases.collection import FEWEST
from lorafind.bases.stored import current, members
from lorafind.formats import groups as group_bits
from lorafind.groups.cluster import LEAST, SAMPLE, Groups, by_density, by_number, outliers
from lorafind.index.classes import kinds
from lorafind.index.opening import snapshot
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store
from lorafind.search.targets import Card, cards

#: Trigger words that are shown of a group.
WORDS = 5
_BLOCK = 512


@dataclass(frozen=True)
class Wishes:
    """What is asked for.

    number: groups per architecture by k-means; None: by density, of at least ``least`` families.
    architecture: only this one, empty for all.
    """

    number: int | None = None
    least: int = LEAST
    architecture: str = ""


@dataclass(frozen=True)
class Member:
    """A LoRA in a group. score: to the central one, as :func:`lorafind.search.similar` scores;
    None for a LoRA of no group. role: ``central``, ``member``, ``outlier`` or ``alone``."""

    lora: int
    path: str
    name: str
    role: str
    score: float | None
    trigger_words: tuple[str, ...]
    other_paths: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """One group, or the LoRAs of an architecture that are in none (number 0).

    central: the LoRA whose mean score to the others is the highest (by distance: the one nearest to
    their mean), None for number 0; families: how many count; spread: 1 − the mean score of the
    other families to the central LoRA; trigger_words: those that more families of the group name
    than chance has it, the most frequent first; members: the most central first.
    """

    number: int
    architecture: str
    basis: str
    central: Member | None
    families: int
    spread: float | None
    trigger_words: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def path(self) -> str | None:
        """Of the central LoRA."""
        return self.central.path if self.central else None

    @property
    def outliers(self) -> int:
        """How many members are unusually far from the centre."""
        return sum(member.role == "outlier" for member in self.members)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "path": self.path,
            "group": self.number or None,
            "loras": len(self.members),
            "families": self.families,
            "spread": self.spread,
            "outliers": self.outliers,
            "trigger_words": list(self.trigger_words),
            "architecture": self.architecture,
            "basis": self.basis,
            "members": [asdict(member) for member in self.members],
        }


@dataclass
class Sorted:
    """n LoRAs of one architecture: ids, families (named by an id), labels from 0 (−1: none; the
    largest group first), scores to the central LoRA of the group (NaN: none); central: the id of
    that LoRA per group; spread: per group."""

    architecture: str
    basis: str
    ids: np.ndarray
    families: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    central: list[int]
    spread: list[float]


def groups(
    store: Store, wishes: Wishes | None = None, progress: Progress | None = None
) -> Iterator[Group]:
    """The groups of every architecture, the largest first, and last what is in none.

    What cannot be sorted (too few LoRAs for a basis or for so many groups) is told by
    ``progress.note``. Raises IndexProblem where the architecture asked for is not in the index, or
    nothing can be sorted at all.
    """
    asked, watch = wishes or Wishes(), progress or Silent()
    with snapshot(store.conn):
        found = list(_sorted(store, asked, watch))
        known = _words(store, found)
        for one in found:
            yield from _told(store, one, known)


def sort(
    store: Store,
    architecture: str,
    number: int | None = None,
    least: int = LEAST,
    without: frozenset[int] = frozenset(),
) -> Sorted | None:
    """The LoRAs of one architecture sorted, None where it has no basis.

    number, least: as in :class:`Wishes`; without: ids that are left out. Raises ValueError where
    there are fewer families than groups asked for.
    """
    basis = current(store, architecture, light=True)
    if basis is None or "model" not in basis.spaces:
        return None
    ids, _, families = members(store, architecture)
    kept = ~np.isin(ids, np.fromiter(without, np.int64, len(without)))
    every, families = ids[kept], families[kept]
    heads = every[np.unique(families, return_index=True)[1]]
    if len(heads) > SAMPLE:
        heads = heads[np.linspace(0, len(heads) - 1, SAMPLE).astype(int)]
    decided, vectors = _vectors(store, basis, heads)
    found = by_density(vectors, least) if number is None else by_number(vectors, number)
    given, labels = _given(store, basis, found, decided, every)
    own = families[np.searchsorted(every, given)]
    return _measured(store, basis, given, own, labels, found, decided)


def _sorted(store: Store, wishes: Wishes, watch: Progress) -> Iterator[Sorted]:
    held = store.conn.execute(
        "SELECT architecture, count(*) FROM loras GROUP BY architecture ORDER BY 2 DESC, 1"
    ).fetchall()
    names = list(dict.fromkeys(kind for name, _ in held for kind in kinds(name)))
    if wishes.architecture:
        if wishes.architecture not in names:
            raise IndexProblem(
                f"The index holds no LoRA of the architecture {wishes.architecture!r}; it has "
                f"{', '.join(names) or 'none at all'}."
            )
        names = [wishes.architecture]
    # A LoRA that may be of several architectures is sorted in the first.
    taken: frozenset[int] = frozenset()
    reasons = []
    watch.stage("Sorting", len(names), 0)
    for name in names:
        families = len(np.unique(members(store, name)[2]))
        try:
            found = sort(store, name, wishes.number, wishes.least, taken)
        except ValueError:
            found = None
            why = f"it has {families} families of LoRAs, fewer than {wishes.number} groups"
        else:
            why = (
                f"a basis of its own needs {FEWEST} families of LoRAs, it has {families}: index "
                "more of them, or take a basis that others made with `lorafind basis use FILE`"
                if families < FEWEST
                else "its basis is not fitted yet: run `lorafind index`"
            )
        watch.advance(1, 0)
        if found is None:
            reasons.append(f"{name} is not sorted: {why}.")
            continue
        taken |= set(found.ids.tolist())
        yield found
    if not taken and reasons:
        raise IndexProblem(reasons[0])
    for reason in reasons:
        watch.note(reason)


def _vectors(store: Store, basis: Basis, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids, rising, and vectors (float64) of some LoRAs; without those that cannot be compared."""
    blocks = [
        (ids[picked], rows["vector"][picked].astype(np.float64))
        for ids, rows in store.chunks.scan("embedding", basis.id)
        if (picked := np.isin(ids, wanted) & _comparable(basis, rows)).any()
    ]
    if not blocks:
        return np.zeros(0, np.int64), np.zeros((0, basis.spaces["model"].size))
    ids, vectors = (np.concatenate(column) for column in zip(*blocks, strict=True))
    order = np.argsort(ids)
    return ids[order], vectors[order]


def _comparable(basis: Basis, rows: np.ndarray) -> np.ndarray:
    """False for LoRAs that have none of the groups that vectors are over."""
    return np.asarray(rows["groups"] & group_bits.mask(basis.spaces["model"].groups) != 0)


def _given(
    store: Store, basis: Basis, found: Groups, ids: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, rising, and group of every LoRA that is wanted: of those that decided, as decided."""
    every, labels = [ids], [found.labels]
    for block, rows in store.chunks.scan("embedding", basis.id):
        rest = np.isin(block, wanted) & ~np.isin(block, ids) & _comparable(basis, rows)
        every.append(block[rest])
        labels.append(found.of(rows["vector"][rest].astype(np.float64)))
    joined, given = np.concatenate(every), np.concatenate(labels)
    order = np.argsort(joined)
    return joined[order], given[order]


def _measured(
    store: Store,
    basis: Basis,
    ids: np.ndarray,
    families: np.ndarray,
    labels: np.ndarray,
    found: Groups,
    decided: np.ndarray,
) -> Sorted:
    """The central LoRA, all scores to it and the spread; groups numbered by size."""
    centres = np.zeros((len(found), found.vectors.shape[1]))
    named = np.zeros(len(found), np.int64)
    for label in range(len(found)):
        own = found.labels == label
        mean = found.vectors[own].mean(0)
        # For vectors of length 1 the nearest to the mean has the highest mean cosine.
        nearest = np.argmin(np.linalg.norm(found.vectors[own] - mean, axis=1))
        centres[label], named[label] = found.vectors[own][nearest], decided[own][nearest]
    scores = np.full(len(ids), np.nan)
    for block, rows in store.chunks.scan("embedding", basis.id):
        place = np.searchsorted(ids, block)
        here = (place < len(ids)) & (ids[np.minimum(place, len(ids) - 1)] == block)
        at = place[here]
        for label in np.unique(labels[at]).tolist():
            if label >= 0:
                same = np.flatnonzero(here)[labels[at] == label]
                vectors = rows["vector"][same].astype(np.float64)
                scores[place[same]] = basis.scores(vectors, centres[label])
    spread, size = np.zeros(len(found)), np.zeros(len(found), np.int64)
    for label in range(len(found)):
        heads = np.isin(ids, decided) & (labels == label)
        size[label] = heads.sum()
        others = scores[heads & (ids != named[label])]
        spread[label] = 1.0 - others.mean() if len(others) else 0.0
    order = np.lexsort((named, -size))
    rank = np.full(len(found) + 1, -1)
    rank[order] = np.arange(len(found))
    return Sorted(
        basis.architecture,
        basis.id,
        ids,
        families,
        rank[labels],
        scores,
        named[order].tolist(),
        spread[order].tolist(),
    )


Known = Mapping[str, int]


def _words(store: Store, found: list[Sorted]) -> Known:
    """Trigger word → how many families of all that were sorted name it."""
    told: Counter[str] = Counter()
    for one in found:
        told += _named(store, one, np.ones(len(one.ids), bool))[0]
    return told


def _named(store: Store, one: Sorted, picked: np.ndarray) -> tuple[Counter[str], dict[str, str]]:
    """Trigger word, case folded → families that name it, and how it is written."""
    pairs: set[tuple[str, int]] = set()
    written: dict[str, str] = {}
    for ids, families in _blocks(one, picked):
        for lora, card in cards(store, ids).items():
            for word in card.trigger_words:
                pairs.add((word.casefold(), families[lora]))
                written.setdefault(word.casefold(), word)
    return Counter(word for word, _ in pairs), written


def _blocks(one: Sorted, picked: np.ndarray) -> Iterator[tuple[list[int], dict[int, int]]]:
    ids, families = one.ids[picked].tolist(), one.families[picked].tolist()
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        yield block, dict(zip(block, families[start : start + _BLOCK], strict=True))


def _told(store: Store, one: Sorted, known: Known) -> Iterator[Group]:
    """The groups of an architecture with names and words."""
    total = max(1, len(np.unique(one.families)))
    for label in [*range(len(one.central)), -1]:
        picked = one.labels == label
        if not picked.any():
            continue
        families = len(np.unique(one.families[picked]))
        words: tuple[str, ...] = ()
        if label >= 0:
            counted, written = _named(store, one, picked)
            frequent = [
                word
                for word, times in counted.most_common()
                if times > 1 and times / families > known[word] / total
            ]
            words = tuple(written[word] for word in frequent[:WORDS])
        made = tuple(_members(store, one, picked, label))
        yield Group(
            label + 1,
            one.architecture,
            one.basis,
            made[0] if label >= 0 else None,
            families,
            one.spread[label] if label >= 0 else None,
            words,
            made,
        )


def _members(store: Store, one: Sorted, picked: np.ndarray, label: int) -> Iterator[Member]:
    ids, scores = one.ids[picked], one.scores[picked]
    central = one.central[label] if label >= 0 else -1
    far = np.zeros(len(ids), bool)
    if label >= 0:
        far[ids != central] = outliers(scores[ids != central])
    order = np.lexsort((ids, np.nan_to_num(-scores), ids != central))
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        told: dict[int, Card] = cards(store, ids[block].tolist())
        for at in block.tolist():
            card = told[int(ids[at])]
            role = "alone" if label < 0 else "outlier" if far[at] else "member"
            yield Member(
                card.lora,
                card.paths[0] if card.paths else "",
                card.name,
                "central" if card.lora == central else role,
                None if label < 0 else float(scores[at]),
                card.trigger_words,
                card.paths[1:],
            )
