"""PNG plots of an evaluation, like the figures of the paper. Needs the extra ``plot``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.protocol import usual_metric

if TYPE_CHECKING:
    from lorafind.evaluation.protocol import Row
    from lorafind.evaluation.run import Report, Sight

#: How a calibration is drawn.
LINES = {"none": "--", "scale and offset": "-", "scale only": ":"}
#: Calibrations in plots of results: the two that the paper compares.
COMPARED = ("none", "scale and offset")
_SIZE = (7.0, 4.5)
_DPI = 120


def require() -> None:
    """Raise BasisProblem where plots cannot be made."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise BasisProblem(
            "Plots need matplotlib, which is missing: pip install 'lorafind[plot]'."
        ) from error


def draw(report: Report, folder: Path) -> list[Path]:
    """Write every plot that the report has figures for; returns the files.

    Per feature, over its first combination of groups: ``FEATURE-components.png``, mAP against the
    number of components per split, calibrated and not; ``FEATURE-scales.png``, the calibration
    scales s_k; ``FEATURE-places.png``, the training LoRAs on the first two components with the
    convex hulls of genres (of artists without genres); ``FEATURE-drift.png``, drift against the
    number of training LoRAs per artist.

    Makes the folder. Raises BasisProblem without matplotlib.
    """
    require()
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sight in report.sights:
        rows = [row for row in report.rows if row.feature == sight.feature]
        for name, plot in (
            ("components", lambda axes, rows=rows: components(axes, rows)),
            ("scales", lambda axes, sight=sight: scales(axes, sight)),
            ("places", lambda axes, sight=sight: places(axes, sight)),
            ("drift", lambda axes, rows=rows, sight=sight: drift(axes, rows, sight.components)),
        ):
            figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
            axes = figure.add_subplot()
            if plot(axes):
                axes.set_title(f"{sight.feature}: {axes.get_title()}")
                written.append(folder / f"{sight.feature.replace(' ', '-')}-{name}.png")
                figure.savefig(written[-1])
    return written


def components(axes: Any, rows: Sequence[Row]) -> bool:
    """mAP against the number of components; False where there is nothing to draw.

    By the metric usual for the feature, dashed as it is, solid after calibration; one colour per
    split.
    """
    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    groups = next((row.groups for row in rows if row.table == "protocol"), "")
    metric = usual_metric(rows[0].feature) if rows else ""
    for row in rows:
        usual = row.table == "protocol" and row.groups == groups and row.metric == metric
        if usual and row.components and row.map is not None and row.calibration in COMPARED:
            lines[row.split, row.calibration].append((row.components, row.map))
    if {split for split, _ in lines} > {"test", "test_same"}:
        lines = defaultdict(list, {key: at for key, at in lines.items() if key[0] != "test"})
    splits = list(dict.fromkeys(split for split, _ in lines))
    for (split, kind), points in lines.items():
        told = "calibrated" if kind != "none" else "as it is"
        axes.plot(
            *zip(*sorted(points), strict=True),
            LINES[kind],
            marker=".",
            color=f"C{splits.index(split)}",
            label=f"{split}, {told}",
        )
    title = f"retrieval, {metric}"
    return _named(axes, title, "components", "mAP over the whole ranking, %", bool(lines))


def scales(axes: Any, sight: Sight) -> bool:
    """The calibration scale s_k of every component; 1 is no drift."""
    for kind, found in sight.scales.items():
        axes.plot(np.arange(1, len(found) + 1), found, LINES[kind], label=kind)
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    return _named(axes, "calibration", "component k", "scale s_k", bool(sight.scales))


def places(axes: Any, sight: Sight) -> bool:
    """The training LoRAs on the first two components: colours and hulls per genre, stars artists.

    Without genres, per artist.
    """
    from scipy.spatial import ConvexHull, QhullError

    if sight.places.shape[1] < 2:
        return False
    train = [i for i, one in enumerate(sight.labels) if one.split == "train"]
    with_genres = any(sight.labels[i].genre for i in train)
    areas, artists = defaultdict(list), defaultdict(list)
    for i in train:
        one = sight.labels[i]
        areas[one.genre if with_genres else one.artist].append(sight.places[i])
        artists[one.artist].append(sight.places[i])
    for number, (name, found) in enumerate(sorted(areas.items())):
        points, colour = np.array(found), f"C{number % 10}"
        axes.plot(*points.T, ".", color=colour, label=name or "no genre")
        if len(points) > 2:
            try:
                hull = points[ConvexHull(points).vertices]
            except QhullError:
                # Points on one line have no hull.
                continue
            axes.fill(*hull.T, color=colour, alpha=0.12)
    if with_genres:
        centres = np.array([np.mean(found, 0) for found in artists.values()])
        axes.plot(*centres.T, "*", color="0.2", markersize=7, label="artists")
    return _named(axes, "the first two components", "component 1", "component 2", True)


def drift(axes: Any, rows: Sequence[Row], number: int) -> bool:
    """Spread of unseen LoRAs against the number of training LoRAs per artist.

    number: of components; where a part of the training set has fewer, its most.
    """
    lines: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row.table != "drift" or row.per_artist is None or row.components > number:
            continue
        line = lines[row.split, row.calibration]
        known = line.get(row.per_artist)
        if known is None or known.components < row.components:
            line[row.per_artist] = row
    shown = {s for s, _ in lines if s in ("test_same", "test_diff")} or {"test"}
    for (split, kind), found in lines.items():
        if split in shown and kind in COMPARED:
            points = sorted((size, row.spread) for size, row in found.items())
            told = "calibrated" if kind != "none" else "as it is"
            axes.plot(
                *zip(*points, strict=True),
                LINES[kind],
                marker=".",
                color=f"C{sorted(shown).index(split)}",
                label=f"{split}, {told}",
            )
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    title = f"drift over {number} components"
    return _named(
        axes, title, "training LoRAs per artist", "spread, unseen ÷ training", bool(lines)
    )


def _named(axes: Any, title: str, below: str, beside: str, drawn: bool) -> bool:
    axes.set_title(title)
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    if drawn:
        axes.legend(fontsize="x-small", ncols=2)
    return drawn
