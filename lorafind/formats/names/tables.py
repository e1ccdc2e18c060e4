"""Tables of true names that are files: ``models/<architecture>.toml``.

A table says which layers a network has and how other spellings call them::

    title = "what people call the models of this architecture"
    sources = ["where the names and shapes were read"]
    component = "transformer"       # how canonical names begin
    encoders = ["te1", "te_t5"]     # the text encoders that its models have

    [sizes]                         # numbers with a name
    h = 3072

    [layers]                        # canonical (diffusers) name = [rows, columns]
    "blocks.{0-18}.attn.{to_q,to_k,to_v}" = ["h", "h"]
    "blocks.{0-18}.ff.net.0.proj" = ["4h", "h"]
    "blocks.{0-18}.attn.norm_q" = [128]             # one number: the weight of a norm
    "x_embedder" = ["h", [64, 384]]                 # variants of the model differ

    [names.native]                  # spelling: its name = the canonical names, stacked by rows
    "double_blocks.{0-18}.img_attn.qkv" = "blocks.{}.attn.to_q blocks.{}.attn.to_k …"

Braces hold a range of numbers (``{0-18}``; every third of them: ``{0-18/3}``) or words to choose
from; ``{}`` on the right repeats what the braces on the left chose, in their order. A spelling that
writes a run of a layer's rows alone makes that run a layer of its own (``norm_out.linear.shift``),
and the layer a stack of such runs. Spellings stand in the order in which they are preferred where
one file writes a layer twice.

No table is read before a file has a name that begins as one of its names does, and none is written
out: names are matched (:mod:`lorafind.formats.names.pattern`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import resources
from typing import Any, NamedTuple

from lorafind.formats.names.pattern import Outline, Rule, expand, fill, outline, rules
from lorafind.formats.names.table import Entry, Layer, flatten

_SIZE = re.compile(r"(\d*)([a-z_]+\d*)")
#: How a line of a table begins: the outline of its names up to the first braces.
_LINE = re.compile(r'^"([^"{]*)[^"]*" *=', re.MULTILINE)
_NEEDED = {"title", "sources", "component", "layers"}
_OPTIONAL = {"encoders", "sizes", "names"}


class Match(NamedTuple):
    """A name that a table has. head: how the names of its blocks begin, ``""`` where it has none;
    block: the number of its block.
    """

    entry: Entry
    head: str
    block: int


class _Line(NamedTuple):
    """A line of a table. shape: of a layer (rows, columns, other columns, whether it is a norm);
    meaning: of another spelling, the canonical names.
    """

    pattern: str
    spelling: str
    shape: tuple[int, int, tuple[int, ...], bool] | None
    meaning: tuple[str, ...] = ()


class Table:
    """One network, read from its text when it is first asked."""

    def __init__(self, owner: str, text: str) -> None:
        self.owner = owner
        self._text = text
        self._layers: dict[str, Layer] = {}
        self._matches: dict[Outline, Match | None] = {}

    @cached_property
    def _data(self) -> dict[str, Any]:
        # Most runs read no table.
        import tomllib

        data = tomllib.loads(self._text)
        for key in sorted(_NEEDED - data.keys()):
            raise ValueError(f"{self.owner}: {key} is missing")
        for key in sorted(data.keys() - _NEEDED - _OPTIONAL):
            raise ValueError(f"{self.owner}: {key} is no part of a table")
        return data

    @property
    def title(self) -> str:
        """What people call its models."""
        return str(self._data["title"])

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the names and shapes were read."""
        return tuple(self._data["sources"])

    @property
    def component(self) -> str:
        """How its canonical names begin."""
        return str(self._data["component"])

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders of its models."""
        return tuple(self._data.get("encoders", ()))

    @cached_property
    def spellings(self) -> tuple[str, ...]:
        """Other spellings, the preferred ones first."""
        return tuple(self._data.get("names", {}))

    # -- matching

    def find(self, name: Outline) -> Match | None:
        """What a flattened name means here, None where it is no name of this network."""
        if name not in self._matches:
            self._matches[name] = self._find(name)
        return self._matches[name]

    def _find(self, name: Outline) -> Match | None:
        for rule, line in self._rules.get(name.text, ()):
            chosen = rule.match(name.numbers)
            if chosen is None:
                continue
            paths = (line.pattern,) if line.shape else line.meaning
            parts = tuple(self._layer(fill(path, chosen)) for path in paths)
            written = "" if line.spelling == "diffusers" else line.spelling
            entry = Entry(self.owner, self.component, parts, written)
            return Match(entry, rule.head, rule.block(name.numbers) if rule.head else 0)
        return None

    def beyond(self, name: Outline) -> bool:
        """True where a name would be one of these, had the network more blocks."""
        return self.find(name) is None and any(
            rule.beyond(name.numbers) for rule, _ in self._rules.get(name.text, ())
        )

    def knows(self, text: str) -> bool:
        """True where it has names of an outline, for some numbers."""
        return text in self._rules

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many blocks there are, by head."""
        found: dict[str, int] = {}
        for alternatives in self._rules.values():
            for rule, _ in alternatives:
                if rule.head:
                    stop = next(slot.stop for slot in rule.slots if isinstance(slot, range))
                    found[rule.head] = max(stop, found.get(rule.head, 0))
        return found

    def may_know(self, text: str) -> bool:
        """False where an outline begins as none of its names; the table is not read for that."""
        return text.startswith(self.begins)

    @cached_property
    def begins(self) -> tuple[str, ...]:
        """How the outlines of its names begin, read without the rest of the table."""
        return tuple({outline(flatten(text)).text for text in _LINE.findall(self._text)})

    @cached_property
    def _rules(self) -> dict[str, list[tuple[Rule, _Line]]]:
        found: dict[str, list[tuple[Rule, _Line]]] = {}
        for line in self._lines:
            for text, rule in rules(line.pattern):
                found.setdefault(text, []).append((rule, line))
        return found

    @cached_property
    def _lines(self) -> list[_Line]:
        found = [
            _Line(pattern, "", self._shape(shape))
            for pattern, shape in self._data["layers"].items()
        ]
        for spelling, lines in self._data.get("names", {}).items():
            found += [
                _Line(pattern, spelling, None, tuple(meaning.split()))
                for pattern, meaning in lines.items()
            ]
        return found

    def _layer(self, path: str) -> Layer:
        """The layer of a canonical name. Raises ValueError where there is none."""
        found = self._layers.get(path)
        if found is not None:
            return found
        name = outline(flatten(path))
        for rule, line in self._rules.get(name.text, ()):
            if line.shape and rule.match(name.numbers) is not None:
                rows, columns, widths, norm = line.shape
                return self._layers.setdefault(path, Layer(path, (rows, columns), norm, widths))
        raise ValueError(f"{self.owner}: {path} is no layer")

    def _shape(self, shape: list[Any]) -> tuple[int, int, tuple[int, ...], bool]:
        columns = shape[1] if len(shape) > 1 else 1
        first, *others = columns if isinstance(columns, list) else [columns]
        widths = tuple(self._size(other) for other in others)
        return self._size(shape[0]), self._size(first), widths, len(shape) == 1

    def _size(self, value: int | str) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(value)
        sizes: dict[str, int] = self._data.get("sizes", {})
        if found is None or found[2] not in sizes:
            raise ValueError(f"{self.owner}: {value!r} is no size")
        return int(found[1] or 1) * sizes[found[2]]

    # -- writing out

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every layer by its canonical name. Raises ValueError where one stands twice."""
        found: dict[str, Layer] = {}
        for line in self._lines:
            if line.shape:
                for path, _ in expand(line.pattern):
                    if path in found:
                        raise ValueError(f"{self.owner}: {path} stands twice")
                    found[path] = self._layer(path)
        return found

    @cached_property
    def names(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """(name, spelling, canonical names of its parts) of every other name.

        Raises ValueError where a name means what is no layer, or layers of different widths.
        """
        found = []
        for line in self._lines:
            if line.shape:
                continue
            for name, chosen in expand(line.pattern):
                if any(path.count("{}") > len(chosen) for path in line.meaning):
                    raise ValueError(f"{self.owner}: {name} has fewer braces than its meaning")
                paths = tuple(fill(path, chosen) for path in line.meaning)
                missing = [path for path in paths if path not in self.layers]
                if missing:
                    raise ValueError(f"{self.owner}: {name} means {missing[0]}, which is no layer")
                if len({self.layers[path].shape[1] for path in paths}) != 1:
                    raise ValueError(f"{self.owner}: the parts of {name} differ in width")
                found.append((name, line.spelling, paths))
        return tuple(found)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Every name and what it means, canonical names first."""
        for path, layer in self.layers.items():
            yield path, Entry(self.owner, self.component, (layer,))
        for name, spelling, paths in self.names:
            parts = tuple(self.layers[path] for path in paths)
            written = "" if spelling == "diffusers" else spelling
            yield name, Entry(self.owner, self.component, parts, written)


def parse(owner: str, text: str) -> Table:
    """A table from its TOML, looked through. Raises ValueError where it contradicts itself."""
    table = Table(owner, text)
    known: dict[str, Entry] = {}
    for name, entry in table.entries():
        first = known.setdefault(flatten(name), entry)
        if first.parts != entry.parts:
            raise ValueError(f"{name} means {first.path} and {entry.path} in {owner}")
    return table


@cache
def tables() -> dict[str, Table]:
    """Every table by architecture, in the order of their names."""
    folder = resources.files(__package__) / "models"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {
        (owner := file.name.removesuffix(".toml")): Table(owner, file.read_text("utf-8"))
        for file in files
    }


class Names:
    """The names of all tables."""

    def get(self, flat: str) -> dict[str, Entry]:
        """The entries of a flattened name by owner; empty where no table knows it."""
        name = outline(flat)
        matches = ((owner, table.find(name)) for owner, table in tables().items())
        return {owner: match.entry for owner, match in matches if match is not None}


def index() -> Names:
    """All names of all tables, flattened."""
    return Names()
