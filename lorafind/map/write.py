"""A map into a file, by the ending of its name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lorafind.index.progress import Progress
from lorafind.index.store import Store
from lorafind.map import page, picture
from lorafind.map.collect import Map, Wishes, collect
from lorafind.report.plots import require

PAGES, PICTURES = (".html", ".htm"), (".png", ".svg")


class NoSuchColour(ValueError):
    """A colouring that does not tell two LoRAs of the map apart."""


def write(
    store: Store,
    path: Path,
    wishes: Wishes | None = None,
    progress: Progress | None = None,
    colour: str = "",
) -> Map:
    """Gather a map and write it; see :class:`lorafind.map.collect.Wishes`.

    colour: key of the colouring that is shown (first); empty: the most telling one. Raises
    ValueError for an ending that is neither of PAGES nor of PICTURES, NoSuchColour, BasisProblem
    where there is no basis or a library is missing, OSError where nothing can be written there.
    """
    kind = path.suffix.lower()
    if kind not in (*PAGES, *PICTURES):
        raise ValueError(
            f"{path.name} has no ending that says what to write: take .html, .png or .svg"
        )
    # Not after minutes of work.
    page.require() if kind in PAGES else require()
    if not path.parent.is_dir():
        raise FileNotFoundError(2, os.strerror(2), str(path.parent))
    found = collect(store, replace(wishes or Wishes(), page=kind in PAGES), progress)
    keys = [one.key for one in found.colourings]
    if colour and colour not in keys:
        raise NoSuchColour(
            f"{colour!r} tells no two of these LoRAs apart; there is {', '.join(keys)}"
        )
    if kind in PAGES:
        page.write(found, path, colour)
    else:
        picture.write(found, path, colour or keys[0])
    return found
