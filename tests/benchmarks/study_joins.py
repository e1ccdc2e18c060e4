"""The weights of the groups, and bases of other artists, on FontBench."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from lorafind.bases.collection import WEIGHTS
from lorafind.bases.selection import bend, choose, keeps, own_share, positive
from tests.benchmarks.study_data import (
    GROUPS,
    WORLDS,
    Labelled,
    eigen,
    space,
    views,
    worth,
)
from tests.benchmarks.study_planted import joint_scores
from tests.benchmarks.study_rules import Part, parts

FIXED: dict[str, tuple[float, float, float]] = {
    "1, 0.5, 1": (1, 0.5, 1),
    "1, 1, 1": (1, 1, 1),
    "1, 0.7, 1": (1, 0.7, 1),
    "1, 0.35, 1": (1, 0.35, 1),
    "1, 0, 1": (1, 0, 1),
    "0.7, 0.5, 1": (0.7, 0.5, 1),
    "1, 0.5, 0.7": (1, 0.5, 0.7),
    "self-attention alone": (1, 0, 0),
    "cross-attention alone": (0, 1, 0),
}


def by_share(data: Labelled, train: np.ndarray) -> dict[str, float]:
    """ω² as the share of a group's own variance that stands out."""
    found = {}
    for g in GROUPS:
        (view,) = views(data, train[data.kernel.present[g][train]], {g: 1.0})
        values = positive(eigen(view)[0])
        found[g] = float((values - np.median(values))[: bend(values)].sum() / values.sum())
    return _roots(found)


def by_agreement(data: Labelled, train: np.ndarray) -> dict[str, float]:
    """ω² as signal over noise power of a group's likeness of pairs, from the correlations of the
    three groups: reliability r_g = c_gh·c_gi/c_hi; weight √r/(1 − r)/spread."""
    has = np.logical_and.reduce([data.kernel.present[g][train] for g in GROUPS])
    seen = views(data, train[has], dict.fromkeys(GROUPS, 1.0))
    upper = np.triu_indices(int(has.sum()), 1)
    c = np.corrcoef([v[upper] for v in seen])
    found = {}
    for i, g in enumerate(GROUPS):
        h, j = (i + 1) % 3, (i + 2) % 3
        r = float(np.clip(c[i, h] * c[i, j] / c[h, j], 0.05, 0.95))
        found[g] = r**0.5 / (1 - r) / float(seen[i][upper].std())
    return _roots(found)


def halfway(data: Labelled, train: np.ndarray) -> dict[str, float]:
    """The geometric mean of the fixed weights and those by agreement."""
    return {g: (w * WEIGHTS[g]) ** 0.5 for g, w in by_agreement(data, train).items()}


def _roots(squares: Mapping[str, float]) -> dict[str, float]:
    most = max(squares.values())
    return {g: (v / most) ** 0.5 for g, v in squares.items()}


def ruled(data: Labelled, part: Part, weights: Mapping[str, float]) -> float:
    """What the rule is worth with some weights of the groups."""
    made = space(data, part.train, part.train, part.queries, weights)
    seen = views(data, part.train, weights)
    values, vectors = eigen(np.sum(seen, 0))
    choice = choose(values, vectors, seen)
    k = min(choice.count, made.fitted.size - 1)
    scores = made.scores(choice.fitted[:k], choice.fresh[:k])
    return worth(data, scores, part.queries, part.train)


def groups_table(data: Labelled) -> None:
    """Weights of self-attention, cross-attention and feed-forward, fixed and chosen."""
    chosen = {
        "by share": by_share,
        "by agreement": by_agreement,
        "halfway": halfway,
    }
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for part in parts(data, seeds=2):
        if len(part.weights) < 3:
            continue
        for name, numbers in FIXED.items():
            weights = dict(zip(GROUPS, map(float, numbers), strict=True))
            sums[part.name][name].append(ruled(data, part, weights))
        for name, rule in chosen.items():
            sums[part.name][name].append(ruled(data, part, rule(data, part.train)))
    names = [*FIXED, *chosen]
    table = {p: {n: float(np.mean(v[n])) for n in names} for p, v in sums.items()}
    base = np.array([row["1, 0.5, 1"] for row in table.values()])
    print(
        f"\n## weights of self-attention, cross-attention, feed-forward; {len(table)} collections"
    )
    for name in names:
        column = np.array([row[name] for row in table.values()])
        print(
            f"{name:22s} mean {column.mean():.1f}, against 1, 0.5, 1: worst "
            f"{(column - base).min():.1f}, best {(column - base).max():.1f} | "
            + ", ".join(f"{w} {table[w][name]:.1f}" for w in WORLDS)
        )


class Join:
    """One collection beside one published basis, on the LoRAs that have all groups."""

    def __init__(
        self, data: Labelled, theirs: np.ndarray, own: np.ndarray, queries: np.ndarray
    ) -> None:
        self.data, self.own, self.queries = data, own, queries
        grams = data.kernel.grams
        self.rows = np.concatenate([theirs, own, queries])
        inside = np.ix_(self.rows, self.rows)
        self.per_group = [WEIGHTS[g] ** 2 * grams[g][inside] for g in GROUPS]
        self.gram = np.sum(self.per_group, 0)
        p, n, m = len(theirs), len(own), len(queries)
        one = np.eye(p + n + m)
        self.theirs, self.mine, self.asked = np.split(one, [p, p + n])
        self.mean_p, self.mean_o = self.theirs.mean(0), self.mine.mean(0)
        centred = self.theirs - self.mean_p
        values, vectors = eigen(centred @ self.gram @ centred.T)
        self.k = bend(values)
        self.values = values[: self.k]
        # Components as combinations of rows.
        self.components = (vectors[:, : self.k] / np.sqrt(self.values)).T @ centred

    def worth(self, scores: np.ndarray) -> float:
        """mAP, (same + diff)/2."""
        return worth(self.data, scores, self.queries, self.own)

    def mean(self, own: float) -> np.ndarray:
        """The joined mean, as weights of rows."""
        return own * self.mean_o + (1 - own) * self.mean_p

    def flat(self, mean: np.ndarray) -> float:
        """Centring alone."""
        left, right = self.asked - mean, self.mine - mean
        size = np.einsum("ij,jk,ik->i", right, self.gram, right)
        return self.worth(left @ self.gram @ right.T / np.sqrt(np.maximum(size, 1e-12)))

    def published(self, mean: np.ndarray, residual: float) -> float:
        """Published components, the rest of the space at weight √residual."""
        c = (self.mine - mean) @ self.gram @ self.components.T
        q = (self.asked - mean) @ self.gram @ self.components.T
        left, right = self.asked - mean, self.mine - mean
        size = np.einsum("ij,jk,ik->i", right, self.gram, right)
        mixed = (1 - residual) * q @ c.T + residual * left @ self.gram @ right.T
        length = (1 - residual) * (c**2).sum(1) + residual * size
        return self.worth(mixed / np.sqrt(np.maximum(length, 1e-12)))

    def both(self, mean: np.ndarray, counts: float) -> float:
        """Own rows and published components that count as so many LoRAs (0: own alone)."""
        left, right = self.asked - mean, self.mine - mean
        own, asked = right @ self.gram @ right.T, left @ self.gram @ right.T
        if not counts:
            return self.worth(joint_scores(own, asked, None, None, None))
        scale = np.sqrt(counts / len(self.theirs) * self.values)[:, None]
        extra = scale * self.components
        return self.worth(
            joint_scores(
                own,
                asked,
                extra @ self.gram @ right.T,
                extra @ self.gram @ extra.T,
                left @ self.gram @ extra.T,
            )
        )

    def kept(self, mean: np.ndarray) -> float:
        """What the published components keep of one view's witness for the others."""
        x = self.mine - mean
        halves = [self.per_group[0], self.per_group[1] + self.per_group[2]]
        raw, projected = [], []
        for gram in halves:
            raw.append(x @ gram @ x.T)
            inner = self.components @ gram @ self.components.T
            c = x @ gram @ self.components.T @ np.linalg.pinv(inner, rcond=1e-3, hermitian=True)
            projected.append(c @ c.T)
        kept = keeps(raw, projected)
        return float("nan") if kept is None else kept


def joins_table(data: Labelled) -> None:
    """A collection that grows beside a published basis of the same or of other artists."""
    full = np.logical_and.reduce([data.kernel.present[g] for g in GROUPS])

    def rows(world: str, split: str, artists: list[str]) -> np.ndarray:
        found = data.rows(world, split, artists)
        return found[full[found]]

    def compare(title: str, theirs_of: str, own_of: str, others: int | None, same: bool) -> None:
        print(title)
        for n in (5, 10, 20, 30, 50, 80):
            sums: dict[str, list[float]] = defaultdict(list)
            for seed in range(6):
                rng = np.random.default_rng(seed)
                mine = list(rng.permutation(data.artists(own_of)))
                if others is not None:
                    theirs, mine = mine[:others], mine[others:]
                elif same:
                    theirs = mine
                else:
                    theirs = [a for a in data.artists(theirs_of) if a not in mine]
                pool = rows(own_of, "train", mine)
                if n > len(pool):
                    continue
                own = np.sort(rng.choice(pool, n, replace=False))
                join = Join(data, rows(theirs_of, "train", theirs), own, rows(own_of, "test", mine))
                mean = join.mean(own_share(n))
                sums["plain"].append(join.flat(0 * mean))
                sums["own mean"].append(join.flat(join.mean_o))
                sums["published mean"].append(join.flat(join.mean_p))
                sums["joined mean"].append(join.flat(mean))
                sums["published components"].append(join.published(mean, 0.0))
                sums["+ residual 0.2"].append(join.published(mean, 0.2))
                if n >= 20:
                    sums["own"].append(join.both(join.mean_o, 0))
                    for counts in (20, 40, 80):
                        sums[f"joined {counts}"].append(join.both(mean, counts))
                sums["keeps ×100"].append(100 * join.kept(mean))
            if sums:
                line = ", ".join(f"{k} {np.mean(v):.1f}" for k, v in sums.items())
                print(f"  n {n:2d}: {line}", flush=True)

    print("\n## a published basis beside a growing collection; mAP (same + diff)/2")
    for world, counts in (("wild", (2, 5, 10, 15)), ("fixed", (3, 6)), ("thin", (3, 6))):
        for count in counts:
            title = f"{world}, basis of {count} other artists"
            compare(title, world, world, count, False)
    for theirs in ("fixed", "thin"):
        compare(f"{theirs}, basis of 8 other artists of wild", "wild", theirs, None, False)
    for theirs, own in (("wild", "thin"), ("fixed", "thin"), ("thin", "fixed")):
        compare(f"{own}, basis of the same artists of {theirs}", theirs, own, None, True)
