"""What docs/ADDING-A-MODEL.md shows is true, and the key lists beside the tests are understood."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest

from lorafind.formats import keys, prefixes
from lorafind.formats.names import clip, tables
from lorafind.formats.names.table import Entry

PAGE = Path(__file__).parents[2] / "docs" / "ADDING-A-MODEL.md"
LISTS = sorted((Path(__file__).parent / "keys").glob("*.json"))


def blocks(language: str) -> list[str]:
    """The code of a language on the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


def test_the_table_on_the_page_is_part_of_the_real_one() -> None:
    (text,) = blocks("toml")
    excerpt = tables.parse("pixart", text)
    real = tables.tables()["pixart"]
    assert (excerpt.title, excerpt.component) == (real.title, real.component)
    assert excerpt.encoders == real.encoders
    assert excerpt.sources[0] in real.sources[0]
    lines = dict(real.entries())
    shown = dict(excerpt.entries())
    assert {name: lines[name] for name in shown} == shown
    fused = shown["blocks.27.cross_attn.kv_linear"]
    assert [(part.path, start, stop) for part, start, stop in fused.cuts()] == [
        ("transformer_blocks.27.attn2.to_k", 0, 1152),
        ("transformer_blocks.27.attn2.to_v", 1152, 2304),
    ]


def test_the_key_list_on_the_page_is_understood(tmp_path: Path) -> None:
    (text,) = blocks("json")
    (tmp_path / "page.json").write_text(text, "utf-8")
    assert strangers(tmp_path / "page.json") == []


def test_the_page_names_what_there_is() -> None:
    root = PAGE.parents[1]
    for name in re.findall(r"(?:lorafind|tests)/[\w/.]+\.py", PAGE.read_text("utf-8")):
        assert (root / name).is_file(), name


def strangers(path: Path) -> list[str]:
    """The keys of a list that are in no table of its architecture, or in another shape."""
    data = json.loads(path.read_text("utf-8"))
    shapes: dict[str, dict[str, tuple[int, ...] | None]] = defaultdict(dict)
    for key, shape in data["keys"].items():
        part = keys.split(key)
        shapes[part.stem][part.role] = None if shape is None else tuple(shape)
    return [stem for stem, roles in shapes.items() if not known(data["arch"], stem, roles)]


def known(arch: str, stem: str, roles: dict[str, tuple[int, ...] | None]) -> bool:
    flat = prefixes.name_of(stem).flat
    owners = {arch, *tables.tables()[arch].encoders}
    found: dict[str, Entry] = {**clip.index().get(flat), **tables.index().get(flat)}
    up, down = roles.get("up"), roles.get("down")
    mine = [entry for owner, entry in found.items() if owner in owners]
    if up is None or down is None:
        return bool(mine)
    shape = (up[0], math.prod(down[1:]))
    return any(entry.fits(shape, "weight") for entry in mine)


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_key_lists_are_understood(path: Path) -> None:
    data = json.loads(path.read_text("utf-8"))
    assert path.stem == f"{data['arch']}-{data['spelling']}"
    assert data["provenance"] in ("captured", "captured-partial", "derived")
    assert data["source"] and data["keys"]
    assert strangers(path) == []


def test_a_strange_key_is_found(tmp_path: Path) -> None:
    stems = ["blocks.0.attn.qkv", "blocks.28.attn.qkv", "blocks.0.attn.proj"]
    rows = {"blocks.0.attn.qkv": 3456, "blocks.28.attn.qkv": 3456, "blocks.0.attn.proj": 3456}
    made = {f"{stem}.lora_A.weight": [4, 1152] for stem in stems}
    made |= {f"{stem}.lora_B.weight": [rows[stem], 4] for stem in stems}
    (tmp_path / "made.json").write_text(json.dumps({"arch": "pixart", "keys": made}), "utf-8")
    assert strangers(tmp_path / "made.json") == stems[1:]
