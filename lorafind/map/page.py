"""The interactive page: one HTML file with its data and plotly.js inside, which opens from disk.

Names, paths and words come from strangers' files. They stand in one JSON block in which ``<``,
``>`` and ``&`` are escapes, so that nothing in it can end the block; the script of the page writes
them as text only (``textContent``), never as HTML. A Content-Security-Policy lets run the two
scripts whose hashes it names and nothing else, and forbids every connection. plotly.js compiles its
WebGL shaders' callers with ``Function``, hence ``unsafe-eval``; no text of the data gets there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.files.whole import whole
from lorafind.map.collect import Map
from lorafind.map.points import AXES, COMPONENTS

#: Digits of coordinates and scores in the page.
_DIGITS = 5
_MARK = re.compile(r"\{\{(\w+)\}\}")
_POLICY = (
    "default-src 'none'; script-src {scripts} 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; worker-src blob:; connect-src 'none'; base-uri 'none'; "
    "form-action 'none'"
)


def require() -> None:
    """Raise BasisProblem where pages cannot be made."""
    if find_spec("plotly") is None:
        raise BasisProblem(
            "The interactive map needs plotly, which is missing: pip install 'lorafind[map]', or "
            "ask for a picture (-o map.png)."
        )


def write(found: Map, path: Path, colour: str = "") -> None:
    """Write the page in one go: a file of that name is replaced whole or not at all.

    colour: key of the colouring that it opens with; empty: the first.

    Raises BasisProblem without plotly, OSError where the file cannot be written.
    """
    text = page(found, colour)
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def page(found: Map, colour: str = "") -> str:
    """The HTML. Raises BasisProblem without plotly."""
    require()
    own = files("lorafind.map")
    library = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    # The parser of HTML turns a CR into a LF, which would change the hash.
    library = library.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")
    script = (own / "page.js").read_text(encoding="utf-8")
    scripts = " ".join(f"'sha256-{_hash(text)}'" for text in (library, script))
    parts = {
        "policy": _POLICY.format(scripts=scripts),
        "style": (own / "page.css").read_text(encoding="utf-8"),
        "data": embedded({**content(found), "colour": colour}),
        "library": library,
        "script": script,
    }
    # One pass: what stands in the data is never taken for a mark.
    return _MARK.sub(lambda mark: parts[mark[1]], (own / "page.html").read_text(encoding="utf-8"))


def content(found: Map) -> dict[str, Any]:
    """The data of the page in plain values."""
    told = found.points
    place = {point.lora: number for number, point in enumerate(told)}
    word = AXES[found.layout]
    return {
        "architecture": found.architecture,
        "basis": found.basis,
        "way": "first components" if found.layout == COMPONENTS else word,
        "axes": [f"{word} {number}" for number in (1, 2, 3)],
        "left_out": found.left_out,
        "name": [point.name for point in told],
        "path": [point.path for point in told],
        "rank": [point.rank for point in told],
        "family": [point.family for point in told],
        "words": [point.trigger_words for point in told],
        "base": [point.base_model for point in told],
        "folder": [point.folder for point in told],
        "label": [point.label for point in told],
        "genre": [point.genre for point in told],
        "group": [point.group for point in told],
        "copies": [point.copies for point in told],
        "flat": _columns(found.flat),
        "deep": _columns(found.deep),
        "near": found.near.tolist(),
        "scores": [
            [None if np.isnan(score) else round(score, 3) for score in row]
            for row in found.scores.tolist()
        ],
        "pictures": {place[lora]: jpeg for lora, jpeg in found.pictures.jpegs.items()},
        "colourings": [
            {
                "key": one.key,
                "title": one.title,
                "names": one.names,
                "grey": one.grey,
                "of": one.of,
                "shapes": [
                    {"centre": shape.centre, "outline": shape.outline, "faces": shape.faces}
                    for shape in one.shapes
                ],
            }
            for one in found.colourings
        ],
    }


def embedded(value: Any) -> str:
    """JSON that can stand in a ``script`` element: no ``<``, ``>`` or ``&`` in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _columns(places: np.ndarray) -> list[list[float]]:
    return [[round(value, _DIGITS) for value in column] for column in places.T.tolist()]


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
