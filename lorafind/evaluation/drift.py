"""Drift: how far the projections of unseen LoRAs fall short of those of the training LoRAs.

Components that were fitted on few LoRAs in many dimensions fit what is peculiar to each of them.
The training LoRAs lie far out along them, a new LoRA of the same artist near the centre. Here the
components are fitted on growing parts of the training LoRAs, so many of every artist. The paper
shows such a curve in its figure 5; how it measures drift was not at hand, these definitions are
ours. Over the first k coordinates c, which are centred on the fitted LoRAs:

- spread: the root mean square of ‖c‖ over the unseen LoRAs divided by that over the fitted ones. 1:
  no drift; 0: all unseen LoRAs at the centre.
- distance: from the mean of an artist's unseen LoRAs to the mean of its fitted ones, on average
  over artists, divided by the root mean square distance of the artists' fitted means from the
  centre. 0: no drift; 1: as far as from the centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorafind.bases.calibration import artist_means
from lorafind.evaluation.protocol import Row, Settings, Space, grid
from lorafind.evaluation.scoring import Subject
from lorafind.index.progress import Progress, Silent

#: LoRAs of every artist in the parts of the training set; the last part is all of it.
PER_ARTIST = (2, 3, 4, 6, 8, 12, 16, 24)


def drift(subject: Subject, settings: Settings, watch: Progress | None = None) -> list[Row]:
    """Rows with spread and distance: parts × calibrations × numbers of components × splits."""
    watch = watch or Silent()
    train = subject.rows("train")
    _, counts = np.unique(subject.artists[train], return_counts=True)
    most = int(counts.max(initial=0))
    sizes = sorted({n for n in PER_ARTIST if n < most} | {most} if most > 1 else set())
    watch.stage(f"{subject.feature}, drift", len(sizes), 0)
    found = []
    for size in sizes:
        space = Space(subject, part(subject, train, size, settings.seed))
        for kind in space.kinds:
            for k in grid(settings.components, space):
                placed = space.placed(kind, k)
                for split in subject.queries:
                    rows = subject.rows(split)
                    spread, distance = measured(
                        placed[space.train],
                        subject.artists[space.train].tolist(),
                        placed[rows],
                        subject.artists[rows].tolist(),
                    )
                    row = Row("drift", subject.feature, "all", "components", kind, "euclidean", k)
                    found.append(row.drifted(split, len(rows), size, spread, distance))
        watch.advance(1, 0)
    return found


def part(subject: Subject, train: np.ndarray, size: int, seed: int) -> np.ndarray:
    """``size`` of the training LoRAs of every artist (all where it has fewer), at random.

    With one seed a smaller part lies within a larger one.
    """
    artists = subject.artists
    shuffled = np.random.default_rng(seed).permutation(train)
    kept = [shuffled[artists[shuffled] == a][:size] for a in np.unique(artists[train])]
    return np.sort(np.concatenate(kept))


def measured(
    fitted: np.ndarray, fitted_artists: Sequence[str], new: np.ndarray, new_artists: Sequence[str]
) -> tuple[float, float | None]:
    """(spread, distance) of coordinates, LoRAs × k; no distance without a common artist."""
    size = float(np.sqrt((fitted**2).sum(1).mean()))
    spread = float(np.sqrt((new**2).sum(1).mean())) / size
    order = sorted(set(fitted_artists) & set(new_artists))
    if not order:
        return spread, None
    ours = artist_means(fitted, fitted_artists, order)
    away = np.linalg.norm(artist_means(new, new_artists, order) - ours, axis=1).mean()
    scale = np.sqrt((ours**2).sum(1).mean())
    return spread, float(away / scale) if scale > 0 else None
