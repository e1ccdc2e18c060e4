"""The map as a PNG or SVG picture, like the paper's figures. Needs the extra ``plot``."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from lorafind.files.whole import whole
from lorafind.map.collect import Map
from lorafind.map.points import AXES
from lorafind.report.plots import require

_SIZE = (11.0, 7.5)
_DPI = 150
#: Rows of the legend; what does not fit stands beside it.
_ROWS = 30
_SYMBOLS = "osD^Px"


def write(found: Map, path: Path, colour: str, hulls: bool = True, stars: bool = True) -> None:
    """Draw the points in two dimensions, coloured by the colouring ``colour`` (its key).

    hulls: convex hulls, per genre where colours are labels that have genres, else per colour;
    stars: the centroid of every colour. Raises BasisProblem without matplotlib, OSError where the
    file cannot be written, KeyError for a colouring that the map has not.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    ways = {one.key: one for one in found.colourings}
    one = ways[colour]
    areas = ways["genre"] if colour == "label" and "genre" in ways else one
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    of = np.array(one.of)
    n = len(of)
    for category, name in enumerate(one.names):
        x, y = found.flat[of == category].T
        grey = category >= len(one.names) - one.grey
        axes.plot(
            x,
            y,
            "o" if grey else _SYMBOLS[category // 10 % len(_SYMBOLS)],
            color="0.65" if grey else f"C{category % 10}",
            markersize=6 if n <= 300 else 4 if n <= 2000 else 2,
            alpha=0.85 if n <= 2000 else 0.6,
            markeredgewidth=0,
            label=_text(name or ("in no group" if one.key == "group" else "unknown")),
            zorder=2,
        )
    for number, shape in enumerate(areas.shapes if hulls else ()):
        corners = found.flat[list(shape.outline)]
        if len(corners):
            shade = "0.4" if areas is not one else f"C{number % 10}"
            axes.fill(*corners.T, facecolor=shade, alpha=0.08, zorder=0)
            axes.fill(*corners.T, facecolor="none", edgecolor=shade, linewidth=0.8, zorder=1)
            if areas is not one:
                x, y = corners[np.argmax(corners[:, 1])]
                axes.annotate(_text(areas.names[number]), (x, y), fontsize="small", color="0.3")
    if stars:
        for category, shape in enumerate(one.shapes):
            axes.plot(
                *shape.centre[:2],
                "*",
                color=f"C{category % 10}",
                markeredgecolor="0.15",
                markersize=11,
                zorder=3,
            )
    word = AXES[found.layout]
    axes.set_xlabel(f"{word} 1")
    axes.set_ylabel(f"{word} 2")
    axes.set_title(f"{n} LoRAs of {_text(found.architecture)} by {one.title.lower()}")
    axes.set_aspect("equal", "datalim")
    columns = -(-len(one.names) // _ROWS)
    figure.legend(loc="outside right upper", fontsize="x-small", ncols=columns)
    out = io.BytesIO()
    # Text stays text, and the same map gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lorafind"}):
        kind = path.suffix.lower()[1:]
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    with whole(path) as part:
        part.write_bytes(out.getvalue())


def _text(text: str) -> str:
    """A name as matplotlib shows it: no formulas in it, and never hidden by a leading ``_``."""
    text = text if len(text) <= 40 else text[:39] + "…"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")
