"""By what points are coloured: folder, label, genre, base model, rank, trigger word or group."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lorafind.map.facts import Point
from lorafind.map.shapes import Shape, shape

#: Categories that can be told apart by colour and symbol together; the rest share one grey.
MOST = 60
OTHERS = "others"


@dataclass(frozen=True)
class Colouring:
    """names: of the categories, the last ones may be OTHERS and, for no value, empty; grey: how
    many of these two there are; of: category of every point; shapes: of each category that has a
    colour."""

    key: str
    title: str
    names: tuple[str, ...]
    grey: int
    of: tuple[int, ...]
    shapes: tuple[Shape, ...]


def colourings(found: Sequence[Point], flat: np.ndarray, deep: np.ndarray) -> list[Colouring]:
    """Every way of colouring that tells at least two points apart, the most telling first.

    flat: n × 2, deep: n × 3 coordinates, for the shapes.
    """
    words = Counter(word for point in found for word in dict.fromkeys(point.trigger_words))

    def common(point: Point) -> str:
        """The trigger word that most others have too, so that a style's word beats a single's."""
        return min(point.trigger_words, key=lambda word: (-words[word], word), default="")

    ways: tuple[tuple[str, str, Callable[[Point], str]], ...] = (
        ("label", "Label", lambda point: point.label),
        ("genre", "Genre", lambda point: point.genre),
        ("group", "Group", lambda point: point.group),
        ("folder", "Folder", lambda point: point.folder),
        ("base", "Base model", lambda point: point.base_model),
        ("word", "Trigger word", common),
        ("rank", "Rank", lambda point: point.rank),
    )
    made = [_colouring(key, title, [of(p) for p in found], flat, deep) for key, title, of in ways]
    return [one for one in made if len(one.names) > 1] or [made[-1]]


def _colouring(
    key: str, title: str, values: Sequence[str], flat: np.ndarray, deep: np.ndarray
) -> Colouring:
    count = Counter(value for value in values if value)
    kept = sorted(count, key=lambda name: (-count[name], name))[:MOST]
    kept.sort(key=_natural)
    number = {name: place for place, name in enumerate(kept)}
    last = []
    if len(count) > len(kept):
        last.append(OTHERS)
    if "" in values:
        last.append("")
    unknown = len(kept) + len(last) - 1
    of = [number.get(value, len(kept)) if value else unknown for value in values]
    members: dict[int, list[int]] = defaultdict(list)
    for place, category in enumerate(of):
        members[category].append(place)
    shapes = tuple(shape(flat, deep, members[category]) for category in range(len(kept)))
    return Colouring(key, title, (*kept, *last), len(last), tuple(of), shapes)


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts 4 before 16."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part.casefold())
        for part in re.split(r"(\d+)", text)
    ]
