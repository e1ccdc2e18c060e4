"""Hulls and centroids, against their definition."""

from __future__ import annotations

import numpy as np

from lorafind.map.shapes import shape


def test_hulls_hold_every_point_and_turn_one_way() -> None:
    g = np.random.default_rng(0)
    flat, deep = g.standard_normal((80, 2)), g.standard_normal((80, 3))
    members = list(range(5, 60))
    made = shape(flat, deep, members)
    assert set(made.outline) <= set(members)
    corners = flat[list(made.outline)]
    for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):
        (dx, dy), rest = b - a, flat[members] - a
        assert (dx * rest[:, 1] - dy * rest[:, 0] > -1e-9).all()
    for face in made.faces:
        a, b, c = deep[list(face)]
        side = (deep[members] - a) @ np.cross(b - a, c - a)
        assert (side > -1e-9).all() or (side < 1e-9).all()
    # Euler: a closed surface of triangles.
    assert len(made.faces) == 2 * len({i for face in made.faces for i in face}) - 4
    assert np.allclose(made.centre, [*flat[5:60].mean(0), *deep[5:60].mean(0)])


def test_points_without_extent_have_no_hull() -> None:
    line = np.arange(6.0)[:, None] * np.array([1.0, 2.0])
    flat, deep = line, np.column_stack([line, np.zeros(6)])
    for members in ([0], [0, 1], list(range(6))):
        made = shape(flat, deep, members)
        assert (made.outline, made.faces) == ((), ())
    assert shape(flat, deep, [0, 2]).centre == (1.0, 2.0, 1.0, 2.0, 0.0)
