"""Calibration against numpy's least squares, and on a planted drift."""

from __future__ import annotations

import numpy as np
import pytest

from lorafind.bases import calibration, kernel
from lorafind.bases.calibration import Calibration
from lorafind.bases.kernel import Kernel
from lorafind.bases.problem import BasisProblem
from tests.bases.made import Dense


def two_kinds(seed: int = 0) -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    names = [f"artist {k % 9}" for k in range(27)]
    return rng.normal(size=(27, 5)), names, rng.normal(size=(45, 5)), names + names[:18]


@pytest.mark.parametrize("scale_only", [False, True])
def test_it_is_least_squares_over_the_means_of_artists(scale_only: bool) -> None:
    x, x_names, y, y_names = two_kinds()
    found = calibration.fit(x, x_names, y, y_names, scale_only)
    order = sorted(set(x_names))
    x_mean = np.array([x[[n == a for n in x_names]].mean(0) for a in order])
    y_mean = np.array([y[[n == a for n in y_names]].mean(0) for a in order])
    for k in range(5):
        columns = [x_mean[:, k]] if scale_only else [x_mean[:, k], np.ones(9)]
        expected = np.linalg.lstsq(np.stack(columns, 1), y_mean[:, k])[0]
        np.testing.assert_allclose(found.scale[k], expected[0], rtol=1e-10)
        np.testing.assert_allclose(found.offset[k], 0 if scale_only else expected[1], atol=1e-12)


def test_only_artists_with_both_kinds_count() -> None:
    x, x_names, y, y_names = two_kinds()
    found = calibration.fit(x, x_names, y, y_names)
    more = calibration.fit(np.concatenate([x, [[9.0] * 5]]), [*x_names, "nobody"], y, y_names)
    np.testing.assert_array_equal(found.scale, more.scale)


def test_too_few_artists_are_refused() -> None:
    x, x_names, y, y_names = two_kinds()
    with pytest.raises(BasisProblem, match="1 artists"):
        calibration.fit(x[:1], x_names[:1], y, y_names)
    calibration.fit(x[:1], x_names[:1], y, y_names, scale_only=True)


def test_a_component_without_spread_keeps_its_scale() -> None:
    x, x_names, y, y_names = two_kinds()
    x[:, 2] = 0.0
    assert calibration.fit(x, x_names, y, y_names).scale[2] == 1.0


def test_it_applies_to_any_number_of_components() -> None:
    fix = Calibration(np.array([2.0, 3.0, 4.0]), np.array([1.0, 0.0, -1.0]))
    np.testing.assert_array_equal(fix.apply(np.ones((2, 2))), [[3.0, 3.0]] * 2)


def test_it_repairs_the_drift_of_a_fit_with_more_dimensions_than_loras() -> None:
    """Unseen LoRAs project to less than those of the fit; the scales bring them back."""
    rng = np.random.default_rng(5)
    artists, width = 20, 20_000
    shared = 1.5 * rng.normal(size=(artists, width)) / np.sqrt(width)
    kinds = {"train": 8, "calibration": 3, "test": 4}
    names, blocks, split = [], [], []
    for kind, each in kinds.items():
        artist = np.repeat(np.arange(artists), each)
        blocks.append(shared[artist] + rng.normal(size=(len(artist), width)) / np.sqrt(width))
        names += [str(a) for a in artist]
        split += [kind] * len(artist)
    matrix = Dense({"ff": np.concatenate(blocks)}, step=5000)
    splits, everyone = np.array(split), np.array(names)
    train = np.flatnonzero(splits == "train")
    found = Kernel({"ff": matrix.gram("ff")}, matrix.present)
    layouts = np.zeros(len(splits), int)
    fitted = kernel.fit(found, layouts, np.ones(len(splits)), {"ff": 1.0}, train, most=40)
    x = fitted.coordinates(found, layouts, 40)
    held, test = splits == "calibration", splits == "test"
    spread = np.sqrt((x[test] ** 2).mean(0) / (x[train] ** 2).mean(0))
    # The drift: components beyond the artists hold what only the LoRAs of the fit have.
    assert spread[:19].mean() > 0.8 and spread[25:].mean() < 0.4
    fix = calibration.fit(x[held], everyone[held].tolist(), x[train], everyone[train].tolist())
    means = calibration.artist_means(x[train], everyone[train].tolist(), sorted(set(names)))
    order = np.array([sorted(set(names)).index(a) for a in everyone[test]])

    def off(coordinates: np.ndarray) -> float:
        """Distance of test LoRAs to the mean of their artist's training LoRAs."""
        return float(np.linalg.norm(coordinates - means[order], axis=1).mean())

    assert off(fix.apply(x[test])) < 0.9 * off(x[test])
    # Components of the artists are stretched, those of single LoRAs count for nothing.
    assert 1.02 < fix.scale[:19].mean() < 1.5 and np.abs(fix.scale[25:]).max() < 0.2
