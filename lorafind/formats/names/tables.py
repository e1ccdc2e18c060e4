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

Braces hold a range of numbers or words to choose from; ``{}`` on the right repeats what the braces
on the left chose, in their order. A spelling that writes a run of a layer's rows alone makes that
run a layer of its own (``norm_out.linear.shift``), and the layer a stack of such runs.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from lorafind.formats.names.table import Entry, Index, Layer

_BRACES = re.compile(r"\{([^{}]*)\}")
_SIZE = re.compile(r"(\d*)([a-z_]+\d*)")


@dataclass(frozen=True)
class Table:
    """One network. names: (name, spelling, canonical names of its parts)."""

    owner: str
    title: str
    sources: tuple[str, ...]
    component: str
    encoders: tuple[str, ...]
    layers: dict[str, Layer]
    names: tuple[tuple[str, str, tuple[str, ...]], ...]

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Every name and what it means, canonical names first."""
        for path, layer in self.layers.items():
            yield path, Entry(self.owner, self.component, (layer,))
        for name, spelling, paths in self.names:
            parts = tuple(self.layers[path] for path in paths)
            written = "" if spelling == "diffusers" else spelling
            yield name, Entry(self.owner, self.component, parts, written)


def expand(pattern: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name that a pattern stands for, with what its braces chose."""
    texts = _BRACES.split(pattern)
    choices = [_choices(text) for text in texts[1::2]]
    for chosen in itertools.product(*choices):
        pieces = [*itertools.chain(*zip(texts[::2], chosen, strict=False)), texts[-1]]
        yield "".join(pieces), chosen


def _choices(text: str) -> Sequence[str]:
    first, dash, last = text.partition("-")
    if dash:
        return [str(n) for n in range(int(first), int(last) + 1)]
    return text.split(",")


def _fill(pattern: str, chosen: Sequence[str]) -> str:
    values = iter(chosen)
    return _BRACES.sub(lambda _: next(values), pattern)


def parse(owner: str, text: str) -> Table:
    """A table from its TOML. Raises ValueError where it contradicts itself."""
    data = tomllib.loads(text)
    sizes: dict[str, int] = data.get("sizes", {})

    def size(value: int | str) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(value)
        if found is None or found[2] not in sizes:
            raise ValueError(f"{owner}: {value!r} is no size")
        return int(found[1] or 1) * sizes[found[2]]

    layers: dict[str, Layer] = {}
    for pattern, shape in data["layers"].items():
        rows = size(shape[0])
        columns = shape[1] if len(shape) > 1 else 1
        first, *others = columns if isinstance(columns, list) else [columns]
        widths = tuple(size(other) for other in others)
        for path, _ in expand(pattern):
            if path in layers:
                raise ValueError(f"{owner}: {path} stands twice")
            layers[path] = Layer(path, (rows, size(first)), len(shape) == 1, widths)
    names = []
    for spelling, lines in data.get("names", {}).items():
        for pattern, meaning in lines.items():
            for name, chosen in expand(pattern):
                paths = tuple(_fill(path, chosen) for path in meaning.split())
                missing = [path for path in paths if path not in layers]
                if missing:
                    raise ValueError(f"{owner}: {name} means {missing[0]}, which is no layer")
                if len({layers[path].shape[1] for path in paths}) != 1:
                    raise ValueError(f"{owner}: the parts of {name} differ in width")
                names.append((name, spelling, paths))
    return Table(
        owner,
        data["title"],
        tuple(data["sources"]),
        data["component"],
        tuple(data.get("encoders", ())),
        layers,
        tuple(names),
    )


@cache
def tables() -> dict[str, Table]:
    """Every table by architecture, in the order of their names."""
    folder = resources.files(__package__) / "models"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {
        (owner := file.name.removesuffix(".toml")): parse(owner, file.read_text("utf-8"))
        for file in files
    }


@cache
def index() -> Index:
    """All names of all tables, flattened."""
    found = Index()
    for table in tables().values():
        for name, entry in table.entries():
            found.add(entry, [name])
    return found
