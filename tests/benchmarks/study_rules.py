"""Rules for the number of components, on FontBench and on many parts of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lorafind.bases.collection import WEIGHTS
from lorafind.bases.selection import bend, choose, positive, shared
from tests.benchmarks.study_data import (
    GROUPS,
    WORLDS,
    Labelled,
    Space,
    centred,
    eigen,
    mean_precision,
    space,
    views,
    worth,
)


@dataclass(frozen=True)
class Part:
    """A collection and its queries: rows of the data."""

    name: str
    train: np.ndarray
    queries: np.ndarray
    weights: dict[str, float]


def parts(data: Labelled, seeds: int = 3, least: int = 40) -> Iterator[Part]:
    """The worlds, fewer artists, fewer files of each, heavy tails, ranks, groups, mixtures."""
    everything = dict(WEIGHTS)
    for seed in range(seeds):
        for part in _drawn(data, np.random.default_rng(seed)):
            if len(part.train) >= least:
                yield part
    for world in WORLDS:
        train, queries = data.rows(world, "train"), data.rows(world, "test")
        yield Part(world, train, queries, everything)
        yield Part(f"{world} attention", train, queries, {"self_attn": 1.0, "cross_attn": 0.5})
        for g in GROUPS:
            has = data.kernel.present[g]
            yield Part(f"{world} {g}", train[has[train]], queries[has[queries]], {g: 1.0})
    train, queries = data.rows("wild", "train"), data.rows("wild", "test")
    yield Part("wild rank 2, 4", train[data.rank[train] <= 4], queries, everything)
    yield Part("wild rank 8, 16", train[data.rank[train] >= 8], queries, everything)
    for worlds in (("wild", "thin"), ("fixed", "thin"), ("wild", "fixed"), WORLDS):
        yield Part(
            "+".join(worlds),
            np.concatenate([data.rows(w, "train") for w in worlds]),
            np.concatenate([data.rows(w, "test") for w in worlds]),
            everything,
        )


def _drawn(data: Labelled, rng: np.random.Generator) -> Iterator[Part]:
    everything = dict(WEIGHTS)
    for world in WORLDS:
        artists, queries = data.artists(world), data.rows(world, "test")
        for count in (5, 6, 10):
            some = rng.choice(artists, count, replace=False).tolist()
            yield Part(
                f"{world} {count} artists", data.rows(world, "train", some), queries, everything
            )

        def draw(sizes: list[int], world: str = world, artists: list[str] = artists) -> np.ndarray:
            picked = [
                rng.choice(data.rows(world, "train", [a]), size, replace=False)
                for a, size in zip(artists, sizes, strict=True)
            ]
            return np.sort(np.concatenate(picked))

        for size in (2, 4):
            train = draw([size] * len(artists))
            yield Part(f"{world} {size} files each", train, queries, everything)
        tail = [8, 8, *rng.choice([1, 1, 1, 2, 2, 3, 5, 8], len(artists) - 2).tolist()]
        yield Part(f"{world} heavy tail", draw(tail), queries, everything)


def above_mean(values: np.ndarray, factor: float) -> int:
    """λ > factor × the mean."""
    return int((values > factor * values.mean()).sum())


def standing_out(values: np.ndarray, spread: float) -> int:
    """As long as λ_k lies more than ``spread`` standard deviations above the mean of what follows:
    for equal noise, whose eigenvalues fill a semicircle, 2 is its edge."""
    for k in range(len(values) - 3):
        rest = values[k + 1 :]
        if values[k] <= rest.mean() + spread * rest.std():
            return k
    return len(values) - 3


def mirrored(values: np.ndarray) -> int:
    """The edge of a semicircle from its lower half, which styles do not reach: the lowest tenth
    lies 0.687 of the radius below the median."""
    middle, low = np.quantile(values, [0.5, 0.1])
    return int((values > middle + (middle - low) / 0.687).sum())


def bend_of_the_rest(values: np.ndarray) -> int:
    """The median and upper quartile of what is not kept, until nothing changes; the quartile of a
    semicircle lies 0.404 of its radius above the median."""
    k = 0
    for _ in range(6):
        middle, upper = np.quantile(values[k:], [0.5, 0.75])
        found = int((values > middle + (upper - middle) / 0.404).sum())
        if found == k:
            break
        k = found
    return k


def widest_gap(values: np.ndarray) -> int:
    """The largest ratio of neighbours in the upper half."""
    half = len(values) // 2
    return int(np.argmax(values[1 : half - 1] / values[2:half]) + 2)


def broken_stick(values: np.ndarray) -> int:
    """As long as a share exceeds that of the pieces of a stick broken at random."""
    n = len(values)
    expected = np.cumsum((1 / np.arange(1, n + 1))[::-1])[::-1] / n
    below = values / values.sum() <= expected
    return int(np.argmax(below)) if below.any() else n


def gavish_donoho(values: np.ndarray) -> int:
    """Singular values above 1.43 × their median: the optimal hard threshold for few rows."""
    return int((values > 1.43**2 * np.median(values)).sum())


RULES: dict[str, Callable[[np.ndarray], int]] = {
    "bend": bend,
    "λ > 1.15 mean": lambda values: above_mean(values, 1.15),
    "λ > 1.25 mean": lambda values: above_mean(values, 1.25),
    "λ > 1.3 mean": lambda values: above_mean(values, 1.3),
    "λ > 1.5 mean": lambda values: above_mean(values, 1.5),
    "semicircle, 2 sd": lambda values: standing_out(values, 2.0),
    "mirrored lower edge": mirrored,
    "bend of the rest": bend_of_the_rest,
    "widest gap": widest_gap,
    "broken stick": broken_stick,
    "Gavish-Donoho": gavish_donoho,
}


def folds(matrix: np.ndarray, least: float = 0.1) -> int:
    """Components that hold in LoRAs left out: at least this share of the fitted variance, in five
    folds."""
    n = len(matrix)
    order = np.random.default_rng(0).permutation(n)
    ratios = []
    for left in np.array_split(order, 5):
        kept = np.setdiff1d(order, left)
        values, vectors = eigen(matrix[np.ix_(kept, kept)])
        values = np.maximum(values, 1e-12)
        c = matrix[np.ix_(left, kept)] @ vectors / np.sqrt(values)
        ratios.append(((c**2).mean(0) / (values / len(kept)))[: n // 2])
    holds = np.mean(ratios, 0) > least
    return int(np.argmin(holds)) if not holds.all() else n // 2


def weighted(space_: Space, values: np.ndarray, k: int, kind: str) -> np.ndarray:
    """Scores with k components and one kind of weights; values: the eigenvalues."""
    one = np.ones(k)
    share = shared(values)[:k]
    noise = np.median(values)
    if kind == "cut":
        return space_.scores(one)
    if kind == "wiener, no cut":
        wiener = np.maximum(values - noise, 0) / values
        return space_.scores(wiener[: int((wiener > 0).sum())])
    if kind == "root of wiener, no cut":
        wiener = np.sqrt(np.maximum(values - noise, 0) / values)
        return space_.scores(wiener[: int((wiener > 0).sum())])
    if kind == "cut, λ^-1/4":
        return space_.scores(values[:k] ** -0.25)
    if kind == "cut, λ^-1/2":
        return space_.scores(values[:k] ** -0.5)
    if kind == "cut, residual at √0.1":
        rest = np.full(len(values), np.sqrt(0.1))
        rest[:k] = 1.0
        return space_.scores(rest[: space_.fitted.size])
    if kind == "cut, new × ρ^-1/2":
        return space_.scores(one, share**-0.5)
    if kind == "cut, new × 1/ρ":
        return space_.scores(one, 1 / share)
    if kind == "fitted × √ρ, new × 1/√ρ":
        return space_.scores(np.sqrt(share), 1 / np.sqrt(share))
    raise ValueError(kind)


KINDS = (
    "cut",
    "wiener, no cut",
    "root of wiener, no cut",
    "cut, λ^-1/4",
    "cut, λ^-1/2",
    "cut, residual at √0.1",
    "cut, new × ρ^-1/2",
    "cut, new × 1/ρ",
    "fitted × √ρ, new × 1/√ρ",
)
RULE = "the rule"


def judge(data: Labelled, part: Part, train: np.ndarray, all_rules: bool) -> dict[str, float]:
    """Name of a rule → mAP; ``best k`` is the best fixed number without weights."""
    made = space(data, train, part.train, part.queries, part.weights)
    seen = views(data, train, part.weights)
    total = np.sum(seen, 0)
    values, vectors = eigen(total)
    values = positive(values)
    most = min(made.fitted.size, len(values)) - 1
    found: dict[int, float] = {}

    def cut(k: int) -> float:
        k = int(np.clip(k, 2, most))
        if k not in found:
            found[k] = worth(data, made.scores(np.ones(k)), part.queries, part.train)
        return found[k]

    out = {"best k": max(cut(k) for k in [*range(2, 26), 30, 40, 60])}
    flat = centred(data, train, part.train, part.queries, part.weights)
    out["mean alone"] = worth(data, flat, part.queries, part.train)
    artists = len(np.unique(data.artist[part.train])) - 1
    out["bend"] = cut(bend(values))
    if all_rules:
        out |= {name: cut(rule(values)) for name, rule in RULES.items()}
        out["five folds"] = cut(folds(total))
        out["artists − 1 (needs labels)"] = cut(artists)
    k = min(bend(values), most)
    for kind in KINDS[1:]:
        out[kind] = worth(data, weighted(made, values, k, kind), part.queries, part.train)
    choice = choose(values, vectors, seen)
    k = min(choice.count, most)
    scores = made.scores(choice.fitted[:k], choice.fresh[:k])
    out[RULE] = worth(data, scores, part.queries, part.train)
    return out


def rules_table(data: Labelled, fitted_share: float = 1.0, all_rules: bool = True) -> None:
    """Every rule over all parts: its mean, and what it loses to the best number and to the mean."""
    rng = np.random.default_rng(3)
    sums: dict[str, list[dict[str, float]]] = defaultdict(list)
    for part in parts(data):
        train = part.train
        if fitted_share < 1:
            size = round(fitted_share * len(train))
            train = np.sort(rng.choice(train, size, replace=False))
        sums[part.name].append(judge(data, part, train, all_rules))
    names = list(next(iter(sums.values()))[0])
    table = {
        part: {n: float(np.mean([row[n] for row in rows])) for n in names}
        for part, rows in sums.items()
    }
    shown = ("wild", "fixed", "thin", "wild 2 files each", "thin heavy tail", "wild+fixed+thin")
    print(f"\n## {len(table)} collections of 40 files and more, {fitted_share:.0%} of them fitted")
    print(f"{'':28s} mean  to best  worst   to mean alone | {' | '.join(shown)}")
    for name in names:
        column = np.array([row[name] for row in table.values()])
        best = np.array([row["best k"] for row in table.values()])
        flat = np.array([row["mean alone"] for row in table.values()])
        print(
            f"{name:28s} {column.mean():.1f} {(column - best).mean():6.1f}  "
            f"{(column - best).min():6.1f}  {(column - flat).min():8.1f}         | "
            + " | ".join(f"{table[p][name]:.1f}" for p in shown)
            + (f"   worst to mean alone: {list(table)[int((column - flat).argmin())]}")
        )


def worlds_table(data: Labelled) -> None:
    """mAP same/diff of the three worlds, as the README of FontBench gives them."""
    print("\n## the worlds, mAP same/diff")
    for world in WORLDS:
        train = data.rows(world, "train")
        line = []
        for split in ("test_same", "test_diff"):
            queries = data.rows(world, split)
            made = space(data, train, train, queries)
            seen = views(data, train)
            values, vectors = eigen(np.sum(seen, 0))
            choice = choose(values, vectors, seen)
            k = bend(values)
            every = [
                centred(data, train, train, queries),
                made.scores(np.ones(k)),
                made.scores(choice.fitted, choice.fresh),
            ]
            line.append([worth_of(data, scores, queries, train) for scores in every])
        print(
            f"{world:6s} k = {choice.count}: mean alone {line[0][0]:.1f}/{line[1][0]:.1f}, bend "
            f"{line[0][1]:.1f}/{line[1][1]:.1f}, rule {line[0][2]:.1f}/{line[1][2]:.1f}"
        )


def worth_of(data: Labelled, scores: np.ndarray, queries: np.ndarray, answers: np.ndarray) -> float:
    """mAP over all queries, percent."""
    return mean_precision(scores, data.artist[queries], data.artist[answers])


def small_table(data: Labelled) -> None:
    """Small folders: n files drawn from a world."""
    print("\n## n files of a world at random: mean alone, bend, rule (k)")
    for world in WORLDS:
        line = []
        for n in (15, 20, 30, 40, 50, 80):
            rows = []
            for seed in range(8):
                rng = np.random.default_rng(seed)
                train = np.sort(rng.choice(data.rows(world, "train"), n, replace=False))
                part = Part("", train, data.rows(world, "test"), dict(WEIGHTS))
                row = judge(data, part, train, False)
                rows.append([row["mean alone"], row["bend"], row[RULE]])
            line.append(f"{n}: " + " ".join(f"{v:.1f}" for v in np.mean(rows, 0)))
        print(f"{world:6s}", " | ".join(line))
