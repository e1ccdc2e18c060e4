"""The paper's protocol on one feature: clusters and retrieval, by groups, calibration, components.

The data base is the training LoRAs, which the components are fitted on; validation and test LoRAs
ask. The training LoRAs keep their raw projections; with calibration every other LoRA is calibrated,
unless its content is that of a training LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorafind.bases import calibration, metrics
from lorafind.bases.calibration import Calibration
from lorafind.bases.collection import bend
from lorafind.bases.metrics import Clusters, Retrieval
from lorafind.bases.scoring import METRICS, Subject, centred, cosines, nearness, plain, unit
from lorafind.index.progress import Progress, Silent

#: Numbers of components that are tried; 67 and 69 are the paper's choices.
GRID = (5, 10, 15, 20, 30, 40, 60, 67, 69, 80, 100)
CALIBRATIONS = ("none", "scale and offset", "scale only")
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
    0 without; chosen: that number is the best on validation; queries: LoRAs that ask, or that are
    clustered. For drift: per_artist (training LoRAs), spread and distance
    (:mod:`lorafind.bases.drift`). For images: scenario, and similarity of embeddings.
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

    def __init__(self, subject: Subject, train: np.ndarray, most: int = max(GRID)) -> None:
        self.subject, self.train = subject, train
        known = any(has[train].any() for has in subject.kernel.present.values())
        self.fitted = subject.fit(train, most) if known else None
        self._kept: dict[int, np.ndarray] = {}
        seen = {subject.contents[i] for i in train.tolist()}
        self._raw = np.array([content in seen for content in subject.contents])

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

    def calibrated(self, k: int, fix: Calibration | None) -> np.ndarray:
        """n × k: calibrated but for what the components were fitted on; raw without ``fix``."""
        raw = self.coordinates(k)
        return raw if fix is None else np.where(self._raw[:, None], raw, fix.apply(raw))

    def calibration(self, kind: str, k: int, rows: np.ndarray) -> Calibration | None:
        """Of one of CALIBRATIONS, from the calibration LoRAs ``rows``; None for ``none``."""
        if kind == "none":
            return None
        coordinates, artists = self.coordinates(k), self.subject.artists
        return calibration.fit(
            coordinates[rows],
            artists[rows].tolist(),
            coordinates[self.train],
            artists[self.train].tolist(),
            kind == "scale only",
        )

    def kinds(self, rows: np.ndarray) -> tuple[str, ...]:
        """The calibrations that the calibration LoRAs ``rows`` allow."""
        artists = self.subject.artists
        both = len(set(artists[rows].tolist()) & set(artists[self.train].tolist()))
        return CALIBRATIONS if both > 1 else CALIBRATIONS[:1]


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


def grid(asked: Sequence[int], size: int, unlabelled: int) -> list[int]:
    """The numbers of components to try, at most ``size``: those asked for, or GRID and one more."""
    found = {k for k in (asked or (*GRID, unlabelled)) if 1 <= k <= size}
    return sorted(found or {size})


def protocol(
    subject: Subject, settings: Settings, name: str = "all", watch: Progress | None = None
) -> list[Row]:
    """All rows of a subject whose combination of groups is called ``name``."""
    watch = watch or Silent()
    rows = _without(subject)
    space = Space(subject, subject.rows("train"))
    kinds = space.kinds(subject.rows("calibration")) if space.size else ()
    tried = grid(settings.components, space.size, unlabelled(space))
    watch.stage(f"{subject.feature}, {name}", len(kinds) * len(METRICS), 0)
    # Training LoRAs are never calibrated: their clusters are found once.
    trained: dict[tuple[int, str], Clusters | None] = {}
    for kind in kinds:
        fixes = {k: space.calibration(kind, k, subject.rows("calibration")) for k in tried}
        for metric in METRICS:
            rows += _with(space, settings, kind, metric, fixes, trained)
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
    fixes: Mapping[int, Calibration | None],
    trained: dict[tuple[int, str], Clusters | None],
) -> list[Row]:
    """On components: every number of them in ``fixes``, with one calibration and metric."""
    subject, train = space.subject, space.train
    row = Row("protocol", subject.feature, "", "components", kind, metric)
    found: dict[tuple[int, str], Retrieval | None] = {}
    placed = {k: space.calibrated(k, fix) for k, fix in fixes.items()}
    for k, rows in placed.items():
        for split in subject.queries:
            asking = subject.rows(split)
            scores = compared(metric, rows[asking], rows[train])
            found[k, split] = judged(subject, asking, train, scores)
    best = choose({k: found.get((k, "validation")) for k in fixes}, unlabelled(space))
    out = []
    for k, rows in placed.items():
        for split in ("train", *subject.queries):
            one = replace(row, components=k, chosen=k == best, split=split)
            one = one.found(found.get((k, split)))
            if metric in PAIRWISE and (settings.every or one.chosen):
                some = subject.rows(split)
                if split != "train":
                    made = _clustered(subject, some, metric, rows, settings)
                elif (k, metric) in trained:
                    made = trained[k, metric]
                else:
                    made = trained[k, metric] = _clustered(subject, some, metric, rows, settings)
                one = replace(one, queries=len(some)).clustered(made)
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


def unlabelled(space: Space) -> int:
    """The number of components that the eigenvalues alone suggest."""
    return min(bend(space.fitted.eigenvalues), space.size) if space.fitted else 0
