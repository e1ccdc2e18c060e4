"""Convex hulls and centroids of categories, as in the paper's figures of genres and artists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One category in two and three dimensions.

    centre: of its points, 2 + 3 numbers. outline: positions of the points at the corners of the
    plane hull, in order; faces: triples of positions that bound the hull in space. Both are empty
    for fewer than three (four) points or points on one line (plane).
    """

    centre: tuple[float, ...]
    outline: tuple[int, ...]
    faces: tuple[tuple[int, int, int], ...]


def shape(flat: np.ndarray, deep: np.ndarray, members: Sequence[int]) -> Shape:
    """The shape of the points ``members``; flat: n × 2, deep: n × 3."""
    where = np.asarray(members)
    centre = (*flat[where].mean(0).tolist(), *deep[where].mean(0).tolist())
    outline = tuple(where[_hull(flat[where], False)].tolist())
    faces = tuple((a, b, c) for a, b, c in where[_hull(deep[where], True)].tolist())
    return Shape(centre, outline, faces)


def _hull(points: np.ndarray, faces: bool) -> np.ndarray:
    """Corners in order, or faces × 3; none for points without extent in every direction."""
    from scipy.spatial import ConvexHull, QhullError

    nothing = np.empty((0, 3) if faces else 0, np.intp)
    if len(points) <= points.shape[1]:
        return nothing
    try:
        found = ConvexHull(points)
    except QhullError:
        return nothing
    return np.asarray(found.simplices if faces else found.vertices)
