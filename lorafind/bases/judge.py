"""What a basis is made of and asked for, and how well LoRAs are found in it.

All of it works on the inner products of LoRAs (``kernel.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafind.bases import calibration
from lorafind.bases.calibration import Calibration
from lorafind.bases.collection import bend
from lorafind.bases.kernel import Fitted, Kernel
from lorafind.bases.labels import Labelled, queries
from lorafind.bases.metrics import mean_average_precision
from lorafind.features.matrix import Matrix

METRICS = ("cosine", "euclidean")
FIGURES = ("plain", "cosine", "cosine_calibrated", "euclidean", "euclidean_calibrated")


@dataclass(frozen=True)
class Settings:
    """What is asked of a basis.

    name: shown to users; components: their number, chosen on validation (without labels: by the
    eigenvalues) where it is None; calibrate, scale_only: how; metric: ``euclidean`` as in the
    paper, ``cosine``, or empty for the better one on validation; setup: ``same`` or
    ``diff`` calibrates on LoRAs trained on as many pictures as the training ones or on others,
    empty on all; licence, data: sentences for those who fetch the basis.
    """

    name: str
    components: int | None = None
    calibrate: bool = True
    scale_only: bool = False
    metric: str = ""
    setup: str = ""
    licence: str = ""
    data: str = ""
    base_model: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class Material:
    """What a basis is made of: n LoRAs.

    labels: one each, None without labels; layouts: ids into ``digests``; weights: how much each
    counts in means and components; frame: what the vectors of theta and canonical look like
    (:class:`lorafind.features.theta.Frame`, as JSON).
    """

    matrix: Matrix
    architecture: str
    labels: Sequence[Labelled] | None
    layouts: np.ndarray
    digests: Sequence[str]
    contents: Sequence[str]
    weights: np.ndarray
    frame: list[list[Any]] | None = None


@dataclass(frozen=True)
class Line:
    """How well queries of a split find their artist: mAP over the whole ranking, percent.

    plain: without a basis; then by cosine or by distance on the components, with coordinates of
    unseen LoRAs as they are or calibrated (None without a calibration).
    """

    split: str
    queries: int
    plain: float
    cosine: float
    cosine_calibrated: float | None
    euclidean: float
    euclidean_calibrated: float | None

    def way(self, metric: str, calibrated: bool) -> float:
        """The figure of one way to compare."""
        value = getattr(self, f"{metric}_calibrated" if calibrated else metric)
        return float("nan") if value is None else float(value)


class Judge:
    """Coordinates of labelled LoRAs, and how well queries find their artist by them."""

    def __init__(
        self,
        material: Material,
        products: Kernel,
        weights: Mapping[str, float],
        coordinates: np.ndarray,
        train: np.ndarray,
    ) -> None:
        self.labels = material.labels or ()
        self.artists = np.array([one.artist for one in self.labels])
        self.products, self.weights = products, weights
        self.coordinates, self.train = coordinates, train
        self.splits = [s for s in ("validation", *queries(self.labels)) if len(self.rows(s))]

    def rows(self, split: str) -> np.ndarray:
        """The LoRAs of a split; of queries those whose artist trains."""
        rows = np.flatnonzero([one.split == split for one in self.labels])
        return rows[np.isin(self.artists[rows], self.artists[self.train])] if len(rows) else rows

    def calibration(self, settings: Settings) -> Calibration | None:
        """From the calibration LoRAs of the set-up asked for; None where there are none."""
        rows = self.rows("calibration")
        if settings.setup:
            usual = np.median([self.labels[i].images for i in self.train])
            same = np.array([self.labels[i].images == usual for i in rows], bool)
            rows = rows[same == (settings.setup == "same")]
        if not len(rows):
            return None
        return calibration.fit(
            self.coordinates[rows],
            self.artists[rows].tolist(),
            self.coordinates[self.train],
            self.artists[self.train].tolist(),
            settings.scale_only,
        )

    def choose(
        self, fix: Calibration | None, fitted: Fitted, settings: Settings
    ) -> tuple[str, int]:
        """Metric and number of components: the best on validation, of those asked for.

        Without validation LoRAs: cosine, and the number by the eigenvalues.
        """
        sizes = range(2, fitted.size + 1)
        if settings.components or "validation" not in self.splits or not sizes:
            k = settings.components or bend(fitted.eigenvalues)
            sizes = range(min(k, fitted.size), min(k, fitted.size) + 1)
        metrics = [settings.metric] if settings.metric else list(METRICS)
        if "validation" not in self.splits:
            return metrics[0], sizes[0]
        rows = self.rows("validation")
        figures = [
            (round(self._map(rows, self.scores(rows, metric, fix, k)), 3), -k, metric == "cosine")
            for metric in metrics
            for k in sizes
        ]
        # Of equals the fewest components.
        best = max(figures)
        return METRICS[0] if best[2] else METRICS[1], -best[1]

    def line(self, split: str, fix: Calibration | None, k: int) -> Line:
        """What a basis of k components is worth for the queries of a split."""
        rows = self.rows(split)

        def figure(metric: str, own: Calibration | None) -> float:
            return self._map(rows, self.scores(rows, metric, own, k))

        return Line(
            split,
            len(rows),
            self._map(rows, self.plain(rows)),
            figure("cosine", None),
            figure("cosine", fix) if fix else None,
            figure("euclidean", None),
            figure("euclidean", fix) if fix else None,
        )

    def scores(self, rows: np.ndarray, metric: str, fix: Calibration | None, k: int) -> np.ndarray:
        """Of queries against the training LoRAs, which keep their coordinates as they are."""
        one, two = self.coordinates[rows, :k], self.coordinates[self.train, :k]
        if fix is not None:
            one = fix.apply(one)
        if metric == "cosine":
            sizes = np.outer(np.linalg.norm(one, axis=1), np.linalg.norm(two, axis=1))
            return np.divide(one @ two.T, sizes, out=np.zeros(sizes.shape), where=sizes > 0)
        return -((one**2).sum(1)[:, None] + (two**2).sum(1) - 2 * one @ two.T)

    def plain(self, rows: np.ndarray) -> np.ndarray:
        """Cosines without a basis, over the groups in common."""
        total = np.zeros((len(rows), len(self.train)))
        shared = np.zeros_like(total)
        for group, gram in self.products.unit().grams.items():
            has = self.products.present[group]
            share = self.weights[group] ** 2
            total += share * gram[np.ix_(rows, self.train)]
            shared += share * np.outer(has[rows], has[self.train])
        return np.divide(total, shared, out=np.zeros_like(total), where=shared > 0)

    def _map(self, rows: np.ndarray, scores: np.ndarray) -> float:
        relevant = self.artists[rows][:, None] == self.artists[self.train]
        return 100 * mean_average_precision(scores, relevant)
