"""Calibration: what the components say of LoRAs that the PCA has not seen, set right.

A projection of a LoRA that a PCA was fitted on is larger than that of one trained on the same
artist afterwards, and the more so the later the component. Per component k a scale s_k and an
offset t_k bring the second onto the first (section 3.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorafind.bases.problem import BasisProblem


@dataclass(frozen=True)
class Calibration:
    """scale, offset: k numbers each. calibrated = scale · coordinates + offset."""

    scale: np.ndarray
    offset: np.ndarray

    def apply(self, coordinates: np.ndarray) -> np.ndarray:
        """n × k' → n × k', for any k' ≤ k."""
        k = coordinates.shape[1]
        return coordinates * self.scale[:k] + self.offset[:k]

    @classmethod
    def none(cls, k: int) -> Calibration:
        """The one that changes nothing."""
        return cls(np.ones(k), np.zeros(k))


def artist_means(
    coordinates: np.ndarray, artists: Sequence[str], order: Sequence[str]
) -> np.ndarray:
    """Mean coordinates per artist in the given order, len(order) × k."""
    names = np.asarray(artists)
    return np.stack([coordinates[names == artist].mean(0) for artist in order])


def fit(
    calibration: np.ndarray,
    calibration_artists: Sequence[str],
    training: np.ndarray,
    training_artists: Sequence[str],
    scale_only: bool = False,
) -> Calibration:
    """Least squares per component over the artists that have both kinds of LoRAs.

    calibration, training: coordinates, LoRAs × k. With x the mean of an artist's calibration
    LoRAs and y that of its training LoRAs: s = (Σxy − Σx·Σy/n)/(Σx² − (Σx)²/n) and
    t = (Σy − s·Σx)/n, or s = Σxy/Σx² and t = 0 with scale_only. (Equation 3 of the paper prints
    the sum over training projections twice; its S⁴ is over the calibration projections.) A
    component in which the calibration LoRAs do not differ keeps scale 1.

    Raises BasisProblem with fewer than two such artists (scale_only: one).
    """
    order = sorted(set(calibration_artists) & set(training_artists))
    if len(order) < (1 if scale_only else 2):
        raise BasisProblem(
            f"{len(order)} artists have both training and calibration LoRAs: calibration needs "
            "two, or one with --scale-only."
        )
    x = artist_means(calibration, calibration_artists, order)
    y = artist_means(training, training_artists, order)
    if not scale_only:
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
    spread = (x * x).sum(0)
    scale = np.divide((x * y).sum(0), spread, out=np.ones(x.shape[1]), where=spread > 0)
    offset = np.zeros(x.shape[1]) if scale_only else y_mean - scale * x_mean
    return Calibration(scale, offset)
