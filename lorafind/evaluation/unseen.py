"""Artists that a basis has not seen: what components of other artists are worth.

The artists in alphabetical order: every second, from the first on, gives the basis; the LoRAs of
those between them are data base and queries.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorafind.bases.metrics import Retrieval
from lorafind.evaluation.protocol import (
    PAIRWISE,
    Row,
    Settings,
    Space,
    choose,
    compared,
    grid,
    judged,
)
from lorafind.evaluation.scoring import Subject, centred, plain

#: Fewer artists than this on either side say nothing.
FEWEST = 2


def unseen(subject: Subject, settings: Settings) -> list[Row]:
    """Rows of the table ``unseen``, all groups, without calibration.

    Bases: ``none``; ``mean of others``, of all their LoRAs, since a mean needs no labels;
    ``components of others``; ``components of their own``, fitted on the data base itself. The
    number of components is the best for the validation LoRAs of the artists that a basis has seen.
    Nothing where there are fewer than two artists on a side.
    """
    artists = sorted(set(subject.artists[subject.rows("train")].tolist()))
    others, these = artists[::2], artists[1::2]
    if len(these) < FEWEST:
        return []
    known = np.isin(subject.artists, others)
    mine = np.isin(subject.artists, these)
    train = subject.splits == "train"
    base = np.flatnonzero(train & mine)
    rows = []
    products = {"none": plain(subject), "mean of others": centred(subject, np.flatnonzero(known))}
    for basis, found in products.items():
        for split in subject.queries:
            asking = _asking(subject, split, mine)
            row = Row("unseen", subject.feature, "all", basis, metric="cosine", split=split)
            scores = found[np.ix_(asking, base)]
            rows.append(row.found(judged(subject, asking, base, scores)))
    for basis, who in (("components of others", known), ("components of their own", mine)):
        space = Space(subject, np.flatnonzero(train & who))
        if space.size:
            for metric in PAIRWISE:
                rows += _with(space, settings, basis, metric, who, mine, base)
    return [row for row in rows if row.map is not None]


def _with(
    space: Space,
    settings: Settings,
    basis: str,
    metric: str,
    who: np.ndarray,
    mine: np.ndarray,
    base: np.ndarray,
) -> list[Row]:
    subject = space.subject
    validated: dict[int, Retrieval | None] = {}
    rows = []
    for k in grid(settings.components, space):
        row = Row("unseen", subject.feature, "all", basis, "none", metric, k)
        validated[k] = _ask(space, metric, k, _asking(subject, "validation", who), space.train)
        for split in subject.queries:
            found = _ask(space, metric, k, _asking(subject, split, mine), base)
            rows.append(replace(row, split=split).found(found))
    best = choose(validated, space.unlabelled)
    return [replace(row, chosen=row.components == best) for row in rows]


def _ask(
    space: Space, metric: str, k: int, asking: np.ndarray, base: np.ndarray
) -> Retrieval | None:
    placed = space.coordinates(k)
    return judged(space.subject, asking, base, compared(metric, placed[asking], placed[base]))


def _asking(subject: Subject, split: str, side: np.ndarray) -> np.ndarray:
    rows = subject.rows(split)
    return rows[side[rows]]
