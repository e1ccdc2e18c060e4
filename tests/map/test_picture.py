"""PNG and SVG, looked into."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from lorafind.map import picture
from tests.map.made import HOSTILE, made, many, point

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def test_png(tmp_path: Path) -> None:
    picture.write(many(200, kinds=4), tmp_path / "m.png", "label")
    with Image.open(tmp_path / "m.png") as found:
        assert found.format == "PNG" and found.size == (1650, 1125)
        colours = {colour for _, colour in found.convert("RGB").getcolors(1 << 20)}
    # The first four of matplotlib's cycle, as stars, which are opaque.
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)} <= colours


def test_svg_has_names_as_text_and_is_the_same_again(tmp_path: Path) -> None:
    points = [point(k + 1, f"n{k}", label=HOSTILE[k % 11], genre=f"g{k % 2}") for k in range(22)]
    found = made(points, np.random.default_rng(0).standard_normal((22, 3)))
    picture.write(found, tmp_path / "m.svg", "label")
    picture.write(found, tmp_path / "again.svg", "label")
    data = (tmp_path / "m.svg").read_bytes()
    assert data == (tmp_path / "again.svg").read_bytes()
    tree = ET.fromstring(data)
    texts = [e.text or "" for e in tree.iter("{http://www.w3.org/2000/svg}text")]
    for name in HOSTILE:
        shown = picture._text(name).replace(r"\$", "$").strip("\u200b").split("\u2028")[0]
        assert any(shown[:8] in text for text in texts), name
    assert {"g0", "g1"} <= set(texts)
    allowed = {"svg", "g", "path", "defs", "use", "text", "style", "rect", "clipPath", "metadata"}
    kinds = {e.tag.rpartition("}")[2] for e in tree.iter() if "www.w3.org/2000/svg" in e.tag}
    assert kinds <= allowed


def test_a_colouring_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        picture.write(many(20), tmp_path / "m.png", "genre")
    assert not list(tmp_path.iterdir())
