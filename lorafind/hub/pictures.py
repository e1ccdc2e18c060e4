"""The plots of a basis's card, made from its facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(facts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the facts are enough for, as PNG, into a folder.

    Explained variance per component, as a share of the whole, with the chosen number of components
    marked; and, for a calibrated basis, the scales s_k (the paper's 3.3) beside 1, at which nothing
    is scaled. Raises ModuleNotFoundError without matplotlib.
    """
    drawn = []
    if shares := facts.get("explained_variance"):
        axes = _axes("Explained variance per component", "share", shares)
        axes.axvline(facts["components"], color="0.5", linestyle=":")
        axes.set_ylim(bottom=0)
        drawn.append(folder / "explained_variance.png")
        axes.figure.savefig(drawn[-1], dpi=120)
    if (scales := facts.get("scales")) and facts.get("calibration", "none") != "none":
        axes = _axes("Calibration", "scale s_k", scales)
        axes.axhline(1.0, color="0.5", linestyle=":")
        drawn.append(folder / "calibration_scales.png")
        axes.figure.savefig(drawn[-1], dpi=120)
    return drawn


def _axes(title: str, label: str, values: Sequence[float]) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 3.2), layout="constrained").add_subplot()
    axes.plot(range(1, len(values) + 1), values, ".-")
    axes.set(title=title, xlabel="component", ylabel=label)
    return axes
