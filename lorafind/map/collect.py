"""Everything that a map shows, gathered from the index once for the page and for the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.bases.labels import Labelled
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store
from lorafind.map.colouring import Colouring, colourings
from lorafind.map.facts import PICTURES, Pictures, Point, line, points, previews, thumbnails
from lorafind.map.nearest import nearest
from lorafind.map.points import COMPONENTS, MOST, gather, largest, place

#: Neighbours of a point that a click shows.
NEIGHBOURS = 8


@dataclass(frozen=True)
class Wishes:
    """What is wanted of a map.

    architecture: empty for the largest; basis: empty for the one in use; layout: a word of
    :data:`lorafind.map.points.METHODS`; groups: how many style groups to find, None for as many as
    there are dense places, 0 for none; room: bytes of thumbnails; most: points; page: False leaves
    out what only the interactive page shows.
    """

    architecture: str = ""
    basis: str = ""
    layout: str = COMPONENTS
    labels: Sequence[Labelled] = ()
    groups: int | None = None
    room: int = PICTURES
    most: int = MOST
    page: bool = True


@dataclass(frozen=True)
class Map:
    """n points. flat: n × 2, deep: n × 3 coordinates, float64; near, scores: n × m, see
    :func:`lorafind.map.nearest.nearest`; left_out, empty: see
    :class:`lorafind.map.points.Embedded`; matched: points that have a label."""

    architecture: str
    basis: str
    layout: str
    points: Sequence[Point]
    flat: np.ndarray
    deep: np.ndarray
    near: np.ndarray
    scores: np.ndarray
    colourings: Sequence[Colouring]
    pictures: Pictures = field(default_factory=lambda: Pictures({}))
    left_out: int = 0
    empty: int = 0

    @property
    def matched(self) -> int:
        """How many points have a label."""
        return sum(1 for point in self.points if point.label)


def style_groups(
    store: Store, architecture: str, number: int | None, progress: Progress
) -> dict[int, str]:
    """LoRA id → number and central LoRA of its group, as ``lorafind groups`` finds them in the
    basis in use; LoRAs of no group are left out. What cannot be sorted is told by a note."""
    if number == 0:
        return {}
    from lorafind.groups.sort import Wishes as Asked
    from lorafind.groups.sort import groups

    found = {}
    try:
        for group in groups(store, Asked(number=number, architecture=architecture), progress):
            if group.number and group.central is not None:
                name = f"{group.number}: {line(group.central.name)}"
                found.update({member.lora: name for member in group.members})
    except IndexProblem as problem:
        progress.note(f"No groups on the map: {problem}")
    return found


def collect(store: Store, wishes: Wishes, progress: Progress | None = None) -> Map:
    """Gather a map. Raises BasisProblem where there is no basis or too few LoRAs."""
    progress = progress or Silent()
    architecture = wishes.architecture or largest(store)
    found = gather(store, architecture, wishes.basis, wishes.most)
    ids = found.ids.tolist()
    sorted_in = style_groups(store, architecture, wishes.groups, progress)
    told = points(store, ids, wishes.labels, sorted_in)
    n = len(ids)
    progress.stage(f"places by {wishes.layout}", 2 * n if wishes.page else n, 0)
    flat = place(found.vectors, wishes.layout, 2)
    progress.advance(n, 0)
    if wishes.page:
        deep = place(found.vectors, wishes.layout, 3)
        progress.advance(n, 0)
        near, scores = nearest(found, NEIGHBOURS, progress)
        pictures = thumbnails(previews(store, ids), wishes.room, progress)
    else:
        deep = np.column_stack([flat, np.zeros(n)])
        near, scores = np.empty((n, 0), np.int32), np.empty((n, 0), np.float32)
        pictures = Pictures({})
    return Map(
        architecture,
        found.basis.id,
        wishes.layout,
        told,
        flat,
        deep,
        near,
        scores,
        colourings(told, flat, deep),
        pictures,
        found.left_out,
        found.empty,
    )
