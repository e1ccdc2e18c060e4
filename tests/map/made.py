"""Made maps: many points, and names that try to break out of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorafind.map.collect import Map
from lorafind.map.colouring import colourings
from lorafind.map.facts import Pictures, Point

#: What a file name, a label or a trigger word of a stranger may be.
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg/onload=window.hacked=1>",
    "<b>bold</b><a href='javascript:window.hacked=1'>link</a>",
    "{{script}} {{data}} ${window.hacked=1} $$\\sqrt2$$",
    "<!--<script>",
    "]]>\u2028window.hacked=1\u2029",
    '" onmouseover="window.hacked=1" \'',
    "&lt;script&gt;&amp;",
    "javascript:window.hacked=1",
    "__proto__",
)


def point(lora: int, name: str, **facts: str) -> Point:
    """One LoRA."""
    path = f"/loras/{name}.safetensors"
    return replace(Point(lora, path, name, "16", "lora", (), "", ""), **facts)  # type: ignore[arg-type]


def made(points: Sequence[Point], vectors: np.ndarray, pictures: Pictures | None = None) -> Map:
    """A map whose neighbours are the nearest by Euclidean distance, found the plain way."""
    n = len(points)
    near = np.empty((n, 5), np.int32)
    scores = np.empty((n, 5), np.float32)
    for row in range(n):
        apart = np.linalg.norm(vectors - vectors[row], axis=1)
        apart[row] = np.inf
        near[row] = np.argsort(apart)[:5]
        scores[row] = 1 - apart[near[row]]
    flat, deep = vectors[:, :2], vectors[:, :3]
    ways = colourings(points, flat, deep)
    return Map(
        "sd1", "own", "components", points, flat, deep, near, scores, ways,
        pictures or Pictures({}),
    )  # fmt: skip


def many(n: int, kinds: int = 40) -> Map:
    """n points in clusters, of ``kinds`` folders."""
    g = np.random.default_rng(0)
    centres = g.standard_normal((kinds, 3))
    vectors = centres[np.arange(n) % kinds] + 0.15 * g.standard_normal((n, 3))
    points = [
        point(i + 1, f"lora {i:05}", folder=f"artist {i % kinds}", label=f"artist {i % kinds}")
        for i in range(n)
    ]
    return made(points, vectors)
