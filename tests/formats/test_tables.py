"""The tables that are files: sound, distinct from one another, quick to read, and what they say
where they are wrong.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from lorafind.formats.names import clip, pattern, tables
from lorafind.formats.names.table import flatten

TABLES = tables.tables()
HEAD = 'title = "a model"\nsources = ["nowhere"]\ncomponent = "transformer"\n'
PAIR = HEAD + '[layers]\n"a.{0-1}.q" = [4, 2]\n"a.{0-1}.k" = [2, 2]\n"n" = [4]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "a"', "m: component is missing"),
        (HEAD, "m: layers is missing"),
        ("size = 1\n" + PAIR, "m: size is no part of a table"),
        (HEAD + "[layers", "Expected ']'"),
        (HEAD + '[layers]\n"a" = ["h", 2]', "m: 'h' is no size"),
        (HEAD + '[sizes]\nh = 2\n[layers]\n"a" = ["h2", 2]', "m: 'h2' is no size"),
        (HEAD + '[layers]\n"a.{0-2}" = [2, 2]\n"a.{x,1}" = [2, 2]', "m: a.1 stands twice"),
        (PAIR + '[names.native]\n"b" = "a.2.q"', "m: b means a.2.q, which is no layer"),
        (PAIR + '[names.native]\n"b.{0-2}" = "a.{}.q"', "m: b.2 means a.2.q, which is no layer"),
        (PAIR + '[names.native]\n"b" = "a.0.q n"', "m: the parts of b differ in width"),
        (PAIR + '[names.native]\n"b" = "a.{}.q"', "m: b has fewer braces than its meaning"),
        (PAIR + '[names.native]\n"a.0.q" = "a.0.k"', "a.0.q means a.0.q and a.0.k in m"),
        # Dots and underscores are one.
        (PAIR + '[names.native]\n"a_0.q" = "a.0.k"', "a_0.q means a.0.q and a.0.k in m"),
        (PAIR + '[names.x]\n"b" = "a.0.k"\n[names.y]\n"b" = "a.1.k"', "b means a.0.k and a.1.k"),
        (HEAD + '[layers]\n"a{0-1}{0-1}" = [2, 2]', "two numbers stand side by side"),
    ],
)
def test_a_table_that_contradicts_itself_says_where(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        tables.parse("m", text)
    assert message in str(raised.value)


def test_what_a_table_means() -> None:
    sizes = "[sizes]\nh = 3\n"
    table = tables.parse(
        "m",
        HEAD
        + sizes
        + '[layers]\n"b.{1-5/2}.{q,to.k}" = ["2h", ["h", 7, "4h"]]\n"norm" = ["h"]\n'
        + '[names.native]\n"x.{1-5/2}.qk" = "b.{}.q b.{}.to.k"\n',
    )
    paths = [f"b.{n}.{x}" for n in (1, 3, 5) for x in ("q", "to.k")]
    assert list(table.layers) == [*paths, "norm"]
    layer = table.layers["b.3.q"]
    assert (layer.shape, layer.widths, layer.norm) == ((6, 3), (7, 12), False)
    assert (table.layers["norm"].shape, table.layers["norm"].norm) == ((3, 1), True)
    found = table.find(pattern.outline(flatten("x.3.qk")))
    assert found is not None
    entry = found.entry
    assert (entry.owner, entry.component, entry.spelling) == ("m", "transformer", "native")
    assert [(p.path, *rows) for p, *rows in entry.cuts()] == [("b.3.q", 0, 6), ("b.3.to.k", 6, 12)]
    assert all(table.find(pattern.outline(f"x_{n}_qk")) is None for n in (0, 2, 4, 7))
    assert entry.fits((12, 3), "weight") and entry.fits((12, 12), "weight")
    assert not entry.fits((12, 6), "weight") and not entry.fits((6, 3), "weight")


@pytest.mark.parametrize("owner", list(TABLES))
def test_every_table_is_sound(owner: str) -> None:
    """No name twice, no fused layer of unlike parts, every name found again by matching."""
    file = resources.files("lorafind.formats.names") / "models" / f"{owner}.toml"
    table = tables.parse(owner, file.read_text("utf-8"))
    assert table.title and table.sources
    encoder = owner.partition("-")[0] if owner.startswith("te") else None
    assert table.component == (encoder or "transformer")
    paths = [flatten(path) for path in table.layers]
    assert len(set(paths)) == len(paths)
    for name, entry in table.entries():
        assert len({part.norm for part in entry.parts}) == 1, name
        assert len({part.path for part in entry.parts}) == len(entry.parts), name
        outline = pattern.outline(flatten(name))
        assert TABLES[owner].may_know(outline.text), name
        found = TABLES[owner].find(outline)
        assert found is not None and found.entry.parts == entry.parts, name


@pytest.mark.parametrize("owner", list(TABLES))
def test_text_encoders_have_tables(owner: str) -> None:
    encoders = TABLES[owner].encoders
    assert len(set(encoders)) == len(encoders)
    assert set(encoders) <= clip.WIDTHS.keys() | {name for name in TABLES if name[:2] == "te"}
    assert not (owner.startswith("te") and encoders)


def test_no_two_tables_are_the_same() -> None:
    """Models that no file can tell apart share a table."""
    seen: dict[frozenset[object], str] = {}
    for owner, table in TABLES.items():
        layers = frozenset((flatten(path), layer.shape) for path, layer in table.layers.items())
        assert seen.setdefault(layers, owner) == owner


def test_the_package_carries_every_table() -> None:
    folder = Path(tables.__file__).parent / "models"
    assert set(TABLES) == {path.stem for path in folder.glob("*.toml")}
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["lorafind"]


def test_tables_are_quick_and_need_no_torch() -> None:
    """Written out, all of them take half a second; looking names up in them far less."""
    code = (
        "import sys, time\n"
        "from lorafind.formats.names import tables\n"
        "start = time.process_time()\n"
        "for owner, table in tables.tables().items():\n"
        "    list(table.entries())\n"
        "print(time.process_time() - start, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()
    assert float(seconds) < 10
    assert torch == "False"
    every = [flatten(name) for table in TABLES.values() for name, _ in table.entries()]
    chosen = random.Random(0).sample(every, 2000)
    start = time.process_time()
    assert all(tables.index().get(name) for name in chosen)
    assert not any(tables.index().get(f"{name}_x") for name in chosen)
    assert time.process_time() - start < 5
