"""The rule on planted collections: up to 10,000 LoRAs, with many styles of few files, with none.

A style is a point in a space of 400 directions whose variances fall like 1/j^0.8; a LoRA is its
style, half as much of its own, and noise; three groups see the same through separate directions and
noise. Strengths span FontBench's: the first eigenvalues are 2 to 5 times their mean.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lorafind.bases.collection import SAMPLE
from lorafind.bases.selection import (
    bend,
    choose,
    own_share,
    positive,
    published_rows,
    shared,
)
from tests.benchmarks.study_data import cosine, eigen, mean_precision

STYLES, WIDTH = 400, 6000
GROUP_WEIGHTS = (1.0, 0.5, 1.0)
#: How strongly a group shows a style.
SHOWS = (1.0, 0.4, 1.0)

Sizes = Callable[[np.random.Generator, int], np.ndarray]


def even(count: int) -> Sizes:
    """Every style has this many files."""
    return lambda rng, styles: np.full(styles, count)


def heavy(rng: np.random.Generator, styles: int) -> np.ndarray:
    """Nearly half of the styles have one file, a few up to 30."""
    return np.minimum(np.floor((1 - rng.random(styles)) ** (-1 / 1.1)).astype(int), 30)


class Maker:
    """Draws LoRAs of planted styles; strength: the share of a LoRA that is style (0: none)."""

    def __init__(self, styles: int, strength: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.spread = np.arange(1, STYLES + 1) ** -0.4
        self.spread /= np.linalg.norm(self.spread)
        self.styles = self.rng.normal(size=(styles, STYLES)) * self.spread
        self.strength = strength
        self.means = [
            0.1 * self.rng.normal(size=WIDTH).astype(np.float32) / WIDTH**0.5 for _ in SHOWS
        ]

    def draw(self, which: np.ndarray) -> list[np.ndarray]:
        """Per group n × WIDTH rows of unit length of these styles."""
        n = len(which)
        style = self.styles[which] + 0.7 * self.rng.normal(size=(n, STYLES)) * self.spread
        share = np.clip(self.strength * np.exp(0.5 * self.rng.normal(size=n)), 0, 0.8)
        found = []
        for shows, mean in zip(SHOWS, self.means, strict=True):
            part = (share * shows)[:, None]
            x = self.rng.standard_normal((n, WIDTH), np.float32) * np.sqrt((1 - part) / WIDTH)
            x[:, :STYLES] += np.sqrt(part) * style
            x += mean
            found.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
        return found


def joined(groups: list[np.ndarray], means: list[np.ndarray]) -> np.ndarray:
    """Centred, weighted, side by side."""
    rows = [w * (x - m) for w, x, m in zip(GROUP_WEIGHTS, groups, means, strict=True)]
    return np.concatenate(rows, 1)


def collection(name: str, styles: int, sizes: Sizes, strength: float, seed: int = 0) -> None:
    """One line: mean alone, the bend, the rule, and the best number with the rule's weights."""
    maker = Maker(styles, strength, seed)
    who = np.repeat(np.arange(styles), np.maximum(sizes(maker.rng, styles), 1))
    groups = maker.draw(who)
    asked = maker.rng.choice(who, 200)
    n = len(who)
    fit = np.sort(maker.rng.choice(n, min(n, SAMPLE), replace=False))
    means = [x[fit].mean(0) for x in groups]
    rows, queries = joined(groups, means), joined(maker.draw(asked), means)
    views = [
        w**2 * _product(x[fit] - m) for w, x, m in zip(GROUP_WEIGHTS, groups, means, strict=True)
    ]
    values, vectors = eigen(np.sum(views, 0))
    values = positive(values)
    most = min(len(values) - 1, 600)
    components = (vectors[:, :most] / np.sqrt(values[:most])).T.astype(np.float32) @ rows[fit]
    c, q = rows @ components.T, queries @ components.T
    seen = np.isin(np.arange(n), fit)[:, None]
    share = shared(values)

    def cut(k: int) -> float:
        return mean_precision(cosine(q[:, :k], c[:, :k]), asked, who)

    def scaled(k: int) -> float:
        root = np.sqrt(share[:k])
        made = np.where(seen, c[:, :k] * root, c[:, :k] / root)
        return mean_precision(cosine(q[:, :k] / root, made), asked, who)

    k, choice = min(bend(values), most), choose(values, vectors, views)
    flat = mean_precision(cosine(queries, rows), asked, who)
    grid = [k for k in (2, 4, 8, 12, 20, 30, 50, 80, 120, 180, 260, 400) if k <= most]
    results = {g: scaled(g) for g in grid}
    best = max(results, key=results.__getitem__)
    print(
        f"{name:16s} n {n:5d} styles {styles:4d}: mean alone {flat:.1f}, bend {k}: {cut(k):.1f}, "
        f"rule {choice.count}: {scaled(choice.count):.1f}, best {best}: {results[best]:.1f}",
        flush=True,
    )


def _product(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows @ rows.T, np.float64)


def planted_table(large: bool) -> None:
    """Collections of 30 to 10,000; large: with the largest, which takes minutes."""
    print("\n## planted collections (styles × files of each)")
    shapes: list[tuple[str, int, Sizes]] = [
        ("5 × 8", 5, even(8)),
        ("12 × 8", 12, even(8)),
        ("20 × 8", 20, even(8)),
        ("100 × 8", 100, even(8)),
        ("30 × 3", 30, even(3)),
        ("50 × 2", 50, even(2)),
        ("250 × 2", 250, even(2)),
        ("60 × 1", 60, even(1)),
        ("40, heavy tail", 40, heavy),
        ("150, heavy tail", 150, heavy),
    ]
    for strength, word in ((0.04, "weak"), (0.12, "strong")):
        print(f"{word} styles")
        for name, styles, sizes in shapes:
            collection(name, styles, sizes, strength)
        if large:
            collection("500, heavy tail", 500, heavy, strength)
            collection("500 × 20", 500, even(20), strength)
    print("no styles at all")
    for name, styles, sizes in (("30 × 1", 30, even(1)), ("40 × 8", 40, even(8))):
        collection(name, styles, sizes, 0.0)


def published_table() -> None:
    """How many styles a published basis needs before its components help others."""
    print("\n## planted: 20 styles, n own LoRAs, published basis of other styles (8 files each)")
    for strength, word in ((0.05, "weak"), (0.12, "strong")):
        for styles in (5, 20, 80, 250, 1000):
            for n in (10, 40, 160):
                lines = [_published(styles, n, strength, seed) for seed in range(2)]
                r = np.mean(lines, 0)
                print(
                    f"{word:6s} {styles:4d} published styles, n {n:3d}: mean {r[0]:.1f}, published "
                    f"components {r[1]:.1f}, with residual {r[2]:.1f}, own rule {r[3]:.1f}, joined "
                    f"{r[4]:.1f}",
                    flush=True,
                )


def _published(styles: int, n: int, strength: float, seed: int) -> list[float]:
    maker = Maker(styles + 20, strength, seed)
    theirs = maker.draw(np.repeat(np.arange(styles), 8 if styles <= 250 else 2))
    who, asked = styles + np.arange(n) % 20, styles + np.arange(100) % min(20, n)
    own, queries = maker.draw(who), maker.draw(asked)
    mean_p, mean_o = [x.mean(0) for x in theirs], [x.mean(0) for x in own]
    part = own_share(n)
    means = [part * a + (1 - part) * b for a, b in zip(mean_o, mean_p, strict=True)]
    base = joined(theirs, mean_p)
    values, vectors = eigen(_product(base))
    values = positive(values)
    k = min(bend(values), 128)
    components = (vectors[:, :k] / np.sqrt(values[:k])).T @ base
    x, q = joined(own, means), joined(queries, means)
    raw = q @ x.T
    length = (x**2).sum(1)
    c, d = x @ components.T, q @ components.T
    mixed = 0.8 * d @ c.T + 0.2 * raw
    size = np.sqrt(0.8 * (c**2).sum(1) + 0.2 * length)
    found = [raw / np.sqrt(length), cosine(d, c), mixed / size]
    scores = [mean_precision(s, asked, who) for s in found]
    for extra in (None, published_rows(components, values[:k], len(base))):
        scores.append(mean_precision(_fitted(x, q, extra), asked, who))
    return scores


def _fitted(x: np.ndarray, q: np.ndarray, extra: np.ndarray | None) -> np.ndarray:
    return joint_scores(x @ x.T, q @ x.T, *_extra(x, q, extra))


def _extra(
    x: np.ndarray, q: np.ndarray, extra: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    if extra is None:
        return None, None, None
    return extra @ x.T, extra @ extra.T, q @ extra.T


def joint_scores(
    own: np.ndarray,
    asked: np.ndarray,
    cross: np.ndarray | None,
    inner: np.ndarray | None,
    asked_extra: np.ndarray | None,
) -> np.ndarray:
    """Scores of queries in components of own rows, with published rows beside them or without.

    own: n × n inner products; asked: m × n; cross: p × n; inner: p × p; asked_extra: m × p. What
    stands out is judged by the collection's own eigenvalues.
    """
    values = positive(eigen(own)[0])
    middle, upper = np.quantile(values, [0.5, 0.75])
    if cross is None or inner is None or asked_extra is None:
        whole, right = own, asked
    else:
        whole = np.block([[own, cross.T], [cross, inner]])
        right = np.concatenate([asked, asked_extra], 1)
    found, vectors = eigen(whole)
    k = int(np.clip((found > middle + 2 * (upper - middle)).sum(), 2, (found > 1e-9).sum() - 1))
    root = np.sqrt(np.maximum((found[:k] - middle) / found[:k], 1 / 9))
    mix = vectors[:, :k] / np.sqrt(found[:k])
    return cosine(right @ mix / root, (whole[: len(own)] @ mix) * root)
