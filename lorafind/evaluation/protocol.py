"""The paper's protocol on one feature: clusters and retrieval, by groups, calibration, components.

The data base is the training LoRAs, which the components are fitted on; validation and test LoRAs
ask. The training LoRAs keep their raw projections; with calibration every other LoRA is calibrated,
unless its content is that of a training LoRA. Beside the paper's calibrations stands that of a
collection of which nothing is known, with a number of components that is chosen without labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from lorafind.bases import calibration, metrics, selection
from lorafind.bases.calibration import Calibration
from lorafind.bases.metrics import Clusters, Retrieval
from lorafind.evaluation.scoring import METRICS, Subject, centred, cosines, nearness, plain, unit
from lorafind.index.progress import Progress, Silent

#: Numbers of components that are tried; 67 and 69 are the paper's choices.
GRID = (5, 10, 15, 20, 30, 40, 60, 67, 69, 80, 100)
#: Components that are computed.
MOST = 128
#: Components weighted by the share of their variance that LoRAs have in common, as `similar` does.
UNLABELLED = "without labels"
CALIBRATIONS = ("none", "scale and offset", "scale only", UNLABELLED)
#: Metrics by which ``chosen`` compares calibrations and groups; the others need more than a pair.
PAIRWISE = ("cosine", "euclidean")
#: Features that have a direction per layer and are compared by cosine; the others carry lengths.
DIRECTIONS = ("style", "style exact")


def usual_metric(feature: str) -> str:
    """How coordinates of a feature are compared unless validation says otherwise."""
    return "cosine" if feature in DIRECTIONS else "euclidean"


@dataclass(frozen=True)
class Settings:
    """What is tried.

    groups: name → groups of a combination, empty for all and each alone; components: numbers to
    try, empty for GRID; every: clusters for every combination, not only for those with the chosen
    number of components (they take the time); seed: of k-means and of subsets.
    """

    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    components: Sequence[int] = ()
    every: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the long table; figures are percent, None where there is no such thing.

    table: ``protocol``, ``unseen`` (artists that the basis has not seen), ``drift`` or ``images``;
    basis: ``none``, ``mean`` (centring alone), ``components``, and whose; components: their number,
    0 without; chosen: that number is the best on validation (for the calibration without labels:
    it was chosen without them); queries: LoRAs that ask, or that are
    clustered. For drift: per_artist (training LoRAs), spread and distance
    (:mod:`lorafind.evaluation.drift`). For images: scenario, and similarity of embeddings.
    """

    table: str
    feature: str
    groups: str = ""
    basis: str = "none"
    calibration: str = "none"
    metric: str = ""
    components: int = 0
    chosen: bool = True
    split: str = ""
    queries: int = 0
    map: float | None = None
    map_at: float | None = None
    recall_at: float | None = None
    genre_precision: float | None = None
    ari: float | None = None
    ari_sd: float | None = None
    nmi: float | None = None
    nmi_sd: float | None = None
    per_artist: int | None = None
    spread: float | None = None
    distance: float | None = None
    scenario: str = ""
    similarity: float | None = None

    def found(self, retrieval: Retrieval | None) -> Row:
        """With figures of retrieval."""
        if retrieval is None:
            return self
        share = retrieval.genre_precision
        return replace(
            self,
            queries=retrieval.queries,
            map=100 * retrieval.map,
            map_at=100 * retrieval.map_at,
            recall_at=100 * retrieval.recall_at,
            genre_precision=None if share is None else 100 * share,
        )

    def drifted(
        self, split: str, queries: int, per_artist: int, spread: float, distance: float | None
    ) -> Row:
        """With figures of drift."""
        return replace(
            self,
            split=split,
            queries=queries,
            per_artist=per_artist,
            spread=spread,
            distance=distance,
        )

    def clustered(self, clusters: Clusters | None) -> Row:
        """With figures of clusters."""
        if clusters is None:
            return self
        return replace(
            self,
            ari=100 * clusters.ari,
            ari_sd=100 * clusters.ari_sd,
            nmi=100 * clusters.nmi,
            nmi_sd=100 * clusters.nmi_sd,
        )


class Space:
    """The coordinates of all LoRAs of a subject on the components of some, and their calibration.

    coordinates are on the first k components for any k ≤ ``size``.
    """

    def __init__(self, subject: Subject, train: np.ndarray, most: int = MOST) -> None:
        self.subject, self.train = subject, train
        known = any(has[train].any() for has in subject.kernel.present.values())
        self.fitted = subject.fit(train, most) if known else None
        self._kept: dict[int, np.ndarray] = {}
        seen = {subject.contents[i] for i in train.tolist()}
        self._seen = np.array([content in seen for content in subject.contents])

    @property
    def size(self) -> int:
        """The number of components at hand; 0 where no training LoRA has any of the groups."""
        return self.fitted.size if self.fitted else 0

    def coordinates(self, k: int) -> np.ndarray:
        """n × k."""
        if self.fitted is None:
            return np.zeros((len(self.subject.labels), 0))
        if k not in self._kept:
            subject = self.subject
            self._kept[k] = self.fitted.coordinates(subject.kernel, subject.layouts, k)
        return self._kept[k]

    def placed(self, kind: str, k: int) -> np.ndarray:
        """n × k: coordinates after one of CALIBRATIONS.

        What the components were fitted on keeps its raw coordinates, but without labels: there
        both kinds are weighted (:mod:`lorafind.bases.selection`).
        """
        raw = self.coordinates(k)
        if kind == "none" or self.fitted is None:
            return raw
        fitted = self._seen[:, None]
        if kind == UNLABELLED:
            share = selection.shared(self.fitted.eigenvalues)[:k]
            root = np.sqrt(np.pad(share, (0, k - len(share)), mode="edge"))
            return np.where(fitted, raw * root, raw / root)
        return np.where(fitted, raw, self.calibration(kind, k).apply(raw))

    def calibration(self, kind: str, k: int) -> Calibration:
        """Scales and offsets, from the calibration LoRAs.

        Raises BasisProblem where fewer than two artists have some.
        """
        rows = self.subject.rows("calibration")
        coordinates, artists = self.coordinates(k), self.subject.artists
        return calibration.fit(
            coordinates[rows],
            artists[rows].tolist(),
            coordinates[self.train],
            artists[self.train].tolist(),
            kind == "scale only",
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The calibrations that there are LoRAs for."""
        if not self.size:
            return ()
        artists, rows = self.subject.artists, self.subject.rows("calibration")
        both = len(set(artists[rows].tolist()) & set(artists[self.train].tolist()))
        return CALIBRATIONS if both > 1 else ("none", UNLABELLED)

    @cached_property
    def unlabelled(self) -> int:
        """The number of components that is chosen without labels."""
        if self.fitted is None:
            return 0
        views = list(self.fitted.views.values())
        chosen = selection.choose(self.fitted.eigenvalues, self.fitted.vectors, views)
        return min(chosen.count, self.size)


def judged(
    subject: Subject, asking: np.ndarray, base: np.ndarray, scores: np.ndarray
) -> Retrieval | None:
    """Retrieval of the data base ``base`` by ``asking``; scores: one row per query."""
    artists, genres = subject.artists, subject.genres
    relevant = artists[asking][:, None] == artists[base]
    alike = None
    if genres.astype(bool).any():
        alike = (genres[asking][:, None] == genres[base]) & (genres[asking] != "")[:, None]
    return metrics.retrieval(scores, relevant, alike)


def compared(metric: str, asking: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Scores of coordinates by one of METRICS: q × k and n × k → q × n."""
    if metric == "euclidean":
        return nearness(asking, base)
    return crowded(metric, cosines(asking, base), cosines(base, base))


def crowded(metric: str, scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Cosines as they are, or as CSLS; own: the cosines within the data base."""
    if metric == "cosine":
        return scores
    return metrics.csls(scores, own if metric == "csls within" else None)


def combinations(subject: Subject, settings: Settings) -> dict[str, tuple[str, ...]]:
    """Name → groups of every combination that the subject has something of."""
    have = subject.kernel.groups
    if settings.groups:
        made = {n: tuple(g for g in have if g in wanted) for n, wanted in settings.groups.items()}
        return {name: groups for name, groups in made.items() if groups}
    alone = {g: (g,) for g in have} if len(have) > 1 else {}
    return {"all": have, **alone}


def grid(asked: Sequence[int], space: Space) -> list[int]:
    """The numbers of components to try: those asked for, or GRID and the one without labels."""
    found = {k for k in (asked or (*GRID, space.unlabelled)) if 1 <= k <= space.size}
    return sorted(found or {space.size})


def protocol(
    subject: Subject, settings: Settings, name: str = "all", watch: Progress | None = None
) -> list[Row]:
    """All rows of a subject whose combination of groups is called ``name``."""
    watch = watch or Silent()
    rows = _without(subject)
    space = Space(subject, subject.rows("train"))
    watch.stage(f"{subject.feature}, {name}", len(space.kinds) * len(METRICS), 0)
    # Most calibrations leave the training LoRAs as they are: their clusters are found once.
    trained: dict[tuple[Any, ...], Clusters | None] = {}
    for kind in space.kinds:
        for metric in METRICS:
            rows += _with(space, settings, kind, metric, trained)
            watch.advance(1, 0)
    return [replace(row, groups=name) for row in rows]


def _without(subject: Subject) -> list[Row]:
    """Without components: the feature as it is, and centred on the training LoRAs."""
    train = subject.rows("train")
    rows = []
    for basis, products in (("none", plain(subject)), ("mean", centred(subject, train))):
        own = products[np.ix_(train, train)]
        for metric in METRICS:
            if metric == "euclidean":
                continue
            for split in subject.queries:
                asking = subject.rows(split)
                scores = crowded(metric, products[np.ix_(asking, train)], own)
                row = Row("protocol", subject.feature, "", basis, metric=metric, split=split)
                rows.append(row.found(judged(subject, asking, train, scores)))
    return rows


def _with(
    space: Space,
    settings: Settings,
    kind: str,
    metric: str,
    trained: dict[tuple[Any, ...], Clusters | None],
) -> list[Row]:
    """On components, every number of them, with one calibration and metric."""
    subject, train = space.subject, space.train
    row = Row("protocol", subject.feature, "", "components", kind, metric)
    found: dict[tuple[int, str], Retrieval | None] = {}
    placed = {k: space.placed(kind, k) for k in grid(settings.components, space)}
    for k, rows in placed.items():
        for split in subject.queries:
            asking = subject.rows(split)
            scores = compared(metric, rows[asking], rows[train])
            found[k, split] = judged(subject, asking, train, scores)
    validated = {k: found.get((k, "validation")) for k in placed}
    best = choose(dict.fromkeys(placed) if kind == UNLABELLED else validated, space.unlabelled)
    out = []
    for k, rows in placed.items():
        for split in ("train", *subject.queries):
            one = replace(row, components=k, chosen=k == best, split=split)
            one = one.found(found.get((k, split)))
            if metric in PAIRWISE and (settings.every or one.chosen):
                some = subject.rows(split)
                key = k, metric, split, kind == UNLABELLED
                if key not in trained or split != "train":
                    trained[key] = _clustered(subject, some, metric, rows, settings)
                one = replace(one, queries=len(some)).clustered(trained[key])
            if one.map is not None or one.ari is not None:
                out.append(one)
    return out


def _clustered(
    subject: Subject, some: np.ndarray, metric: str, rows: np.ndarray, settings: Settings
) -> Clusters | None:
    """k-means of some LoRAs; for cosine on their directions."""
    points = rows[some] if metric == "euclidean" else unit(rows[some])
    return metrics.clusters(points, subject.artists[some].tolist(), settings.seed)


def choose(found: Mapping[int, Retrieval | None], unlabelled: int) -> int:
    """The number of components with the best mAP on validation; of equals the fewest.

    found: by number of components; where nothing was validated, the number nearest to
    ``unlabelled``.
    """
    measured = {k: round(one.map, 5) for k, one in found.items() if one is not None}
    if not measured:
        return min(found, key=lambda k: (abs(k - unlabelled), k))
    return min(measured, key=lambda k: (-measured[k], k))
