"""The trained LoRAs of FontBench as style signatures, read once; what a ranking of them is worth.

Everything after the reading is done on the n × n cosines of the signatures.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorafind.bases.collection import WEIGHTS
from lorafind.bases.kernel import Fitted, Kernel, averaging, fit, solve
from lorafind.signatures.constants import STYLE

GROUPS = ("self_attn", "cross_attn", "ff")
WORLDS = ("wild", "fixed", "thin")


@dataclass(frozen=True)
class Labelled:
    """n LoRAs as cosines, with their labels (n each).

    layout: which groups a LoRA has, as a number (FontBench has two layouts of 704 files).
    """

    kernel: Kernel
    world: np.ndarray
    artist: np.ndarray
    split: np.ndarray
    rank: np.ndarray
    layout: np.ndarray

    def rows(self, world: str, split: str, artists: Sequence[str] | None = None) -> np.ndarray:
        """Rows of a world (``*``: all) and of splits that begin with ``split``."""
        picked = np.char.startswith(self.split, split)
        if world != "*":
            picked &= self.world == world
        if artists is not None:
            picked &= np.isin(self.artist, list(artists))
        return np.flatnonzero(picked)

    def artists(self, world: str) -> list[str]:
        """The artists of a world, in alphabetical order."""
        return sorted(set(self.artist[self.world == world].tolist()))


def load(bench: Path, keep: Path | None = None) -> Labelled:
    """The 704 files of all worlds; what is computed is kept under ``keep`` if given."""
    labels = []
    for world in WORLDS:
        with (bench / world / "labels.csv").open(newline="") as file:
            labels += [{**row, "world": world} for row in csv.DictReader(file)]
    kept = keep / "cosines.npz" if keep else None
    if kept and kept.exists():
        with np.load(kept) as stored:
            grams = {g: stored[g] for g in GROUPS}
    else:
        grams = cosines([bench / row["world"] / row["file"] for row in labels])
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, **grams)  # type: ignore[arg-type]

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in labels])

    return Labelled(
        Kernel(grams, {g: np.diag(grams[g]) > 0 for g in GROUPS}),
        column("world"),
        column("artist"),
        column("split"),
        column("rank").astype(int),
        (column("groups") == "all").astype(int),
    )


def cosines(paths: list[Path]) -> dict[str, np.ndarray]:
    """Group → cosines of the style signatures of all pairs; 0 where a file lacks the group."""
    from lorafind.bases.collection import gram
    from lorafind.formats import groups as bits
    from lorafind.search.query import examine_file

    styles = {g: np.zeros((len(paths), STYLE), np.int8) for g in GROUPS}
    for i, path in enumerate(paths):
        signature = examine_file(str(path)).signature
        assert signature is not None
        for g, style in zip(bits.names(signature.groups), signature.style, strict=True):
            styles[g][i] = style
    return {g: gram(styles[g]) for g in GROUPS}


def average_precision(relevant: np.ndarray) -> float:
    """Of one ranking (True where an answer is of the query's artist)."""
    ranks = np.flatnonzero(relevant) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def mean_precision(scores: np.ndarray, query: np.ndarray, answer: np.ndarray) -> float:
    """mAP over the whole ranking, percent. scores: q × n; query, answer: their artists."""
    found = []
    for row, artist in zip(scores, query, strict=True):
        relevant = answer[np.argsort(-row, kind="stable")] == artist
        if relevant.any():
            found.append(average_precision(relevant))
    return 100 * float(np.mean(found))


def cosine(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosines of rows: m × d and n × d → m × n."""
    sizes = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    return np.divide(left @ right.T, sizes, out=np.zeros(sizes.shape), where=sizes > 0)


@dataclass(frozen=True)
class Space:
    """Queries and answers in the components of a basis.

    fitted: the basis; parts, present: of the n answers and then the m queries, as in
    :mod:`lorafind.bases.kernel`; seen: which of them were fitted; count: n.
    """

    fitted: Fitted
    parts: np.ndarray
    present: np.ndarray
    seen: np.ndarray
    count: int

    def scores(self, known: np.ndarray, fresh: np.ndarray | None = None) -> np.ndarray:
        """m × n cosines of weighted coordinates, over the groups that both have.

        known: the weights of k components for what was fitted; fresh: those for the rest (None:
        the same).
        """
        fresh = known if fresh is None else fresh
        k = len(known)
        weights = np.where(self.seen[:, None], known, fresh)
        out = np.zeros((len(self.parts) - self.count, self.count))
        patterns, which = np.unique(self.present, axis=0, return_inverse=True)
        grams = [self.fitted.grams[g] for g in self.fitted.groups]
        for a, one in enumerate(patterns):
            for b, other in enumerate(patterns):
                common = np.broadcast_to(one & other, self.present.shape)
                vectors = solve(grams, self.parts, common, k) * weights
                left = np.flatnonzero(which[self.count :] == a)
                right = np.flatnonzero(which[: self.count] == b)
                out[np.ix_(left, right)] = cosine(vectors[self.count + left], vectors[right])
        return out


def space(
    data: Labelled,
    train: np.ndarray,
    answers: np.ndarray,
    queries: np.ndarray,
    group_weights: Mapping[str, float] = WEIGHTS,
) -> Space:
    """The basis of ``train`` and what it makes of answers and queries (rows of ``data``)."""
    used = data.kernel.only([g for g in GROUPS if group_weights.get(g, 0) > 0])
    fitted = fit(used, data.layout, np.ones(used.count), group_weights, train)
    rows = np.concatenate([answers, queries])
    parts = np.zeros((len(rows), len(fitted.groups), fitted.size))
    for position, g in enumerate(fitted.groups):
        has, index = data.kernel.present[g][rows], fitted.index[g]
        mean = np.array([index.get(layout, index[-1]) for layout in data.layout[rows].tolist()])
        made = fitted.weights[g] * (
            data.kernel.grams[g][np.ix_(rows, fitted.train)] @ fitted.mix[g].T
        )
        parts[has, position] = (made - fitted.centres[g][mean])[has]
    present = np.stack([data.kernel.present[g][rows] for g in fitted.groups], 1)
    return Space(fitted, parts, present, np.isin(rows, train), len(answers))


def views(
    data: Labelled, train: np.ndarray, group_weights: Mapping[str, float] = WEIGHTS
) -> list[np.ndarray]:
    """Per group the centred and weighted inner products of ``train``, n × n."""
    found = []
    n = len(train)
    for g in GROUPS:
        present = data.kernel.present[g][train]
        if group_weights.get(g, 0) == 0 or not present.any():
            continue
        rows, _, which = averaging(data.layout[train], np.ones(n), present)
        centring = (np.eye(n) - rows[which]) * present[:, None]
        inner = data.kernel.grams[g][np.ix_(train, train)]
        found.append(group_weights[g] ** 2 * centring @ inner @ centring.T)
    return found


def eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, falling, and eigenvectors in columns."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def worth(data: Labelled, scores: np.ndarray, queries: np.ndarray, answers: np.ndarray) -> float:
    """Mean of mAP *same* and mAP *diff*, percent, over the queries whose artist has an answer."""
    found = []
    for split in ("test_same", "test_diff"):
        asked = (data.split[queries] == split) & np.isin(data.artist[queries], data.artist[answers])
        found.append(
            mean_precision(scores[asked], data.artist[queries[asked]], data.artist[answers])
        )
    return float(np.mean(found))


def centred(
    data: Labelled,
    train: np.ndarray,
    answers: np.ndarray,
    queries: np.ndarray,
    group_weights: Mapping[str, float] = WEIGHTS,
    plain: bool = False,
) -> np.ndarray:
    """m × n cosines after the means of ``train`` alone; plain: without them, every group a vote."""
    top = np.zeros((len(queries), len(answers)))
    left, right = np.zeros_like(top), np.zeros_like(top)
    for g in GROUPS:
        weight = group_weights.get(g, 0.0)
        gram, present = data.kernel.grams[g], data.kernel.present[g]
        if weight == 0 or not present[train].any():
            continue
        common = np.outer(present[queries], present[answers]) * weight**2
        if plain:
            top += common * gram[np.ix_(queries, answers)]
            left += common
            right += common
            continue
        rows, index, _ = averaging(data.layout[train], np.ones(len(train)), present[train])
        means = rows @ gram[train]  # means × all
        inner = means[:, train] @ rows.T
        q = np.array([index.get(k, 0) for k in data.layout[queries].tolist()])
        a = np.array([index.get(k, 0) for k in data.layout[answers].tolist()])
        cross = (
            gram[np.ix_(queries, answers)]
            - means[a][:, queries].T
            - means[q][:, answers]
            + inner[np.ix_(q, a)]
        )
        top += common * cross
        diagonal = np.diag(gram)
        left += common * (diagonal[queries] - 2 * means[q, queries] + inner[q, q])[:, None]
        right += common * (diagonal[answers] - 2 * means[a, answers] + inner[a, a])
    size = np.sqrt(left * right)
    return np.divide(top, size, out=np.zeros_like(top), where=size > 0)
