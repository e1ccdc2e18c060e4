"""What a table of names is: the true layers of one network, and how each spelling calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

#: (o, n) of a weight: a convolution flattened to o × i·kh·kw, a norm o × 1.
Shape = tuple[int, int]


def flatten(name: str) -> str:
    """The spelling of a name in which dotted and underscored ones meet."""
    return name.replace(".", "_").rstrip("_")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, or a run of a layer's rows that some spelling writes alone.

    path: its canonical (diffusers) name; shape: (o, n); widths: other n that variants of the model
    have (an input that takes more channels).
    """

    path: str
    shape: Shape
    norm: bool = False
    widths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name means in one network.

    owner: the table's key; component: the part of the model, as canonical names begin; parts: its
    layers from the first row to the last, several where a spelling fuses them; spelling: who calls
    them so, empty for the canonical name.
    """

    owner: str
    component: str
    parts: tuple[Layer, ...]
    spelling: str = ""

    @property
    def path(self) -> str:
        """The canonical name of the first part."""
        return self.parts[0].path

    @property
    def shape(self) -> Shape:
        """(o, n) of the whole."""
        if len(self.parts) == 1:
            return self.parts[0].shape
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def fits(self, shape: Shape, kind: str) -> bool:
        """True where a ΔW of this shape can belong here; kind as in :data:`KINDS`."""
        rows, columns = self.shape
        first = self.parts[0]
        if kind == "parameters":
            # What is 0 is not known.
            known = shape[1] in (0, columns, *first.widths)
            return not first.norm and shape[0] in (0, rows) and known
        if kind == "bias":
            return shape == (rows, 1)
        if first.norm != (kind == "norm") or shape[0] != rows:
            return False
        return shape[1] == columns or shape[1] in first.widths

    def cuts(self) -> Iterator[tuple[Layer, int, int]]:
        """(layer, first row, row after the last) of every part."""
        start = 0
        for part in self.parts:
            stop = start + part.shape[0]
            yield part, start, stop
            start = stop


#: ``weight``: of a linear layer or convolution; ``norm``: 1-D weight of a norm; ``bias``;
#: ``parameters``: numbers of another shape that act on the weight (a rotation, a rescaling).
KINDS = ("weight", "norm", "bias", "parameters")


@dataclass
class Index:
    """Flattened name → the entries of every table that has it, by owner."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def add(self, entry: Entry, names: Iterable[str]) -> None:
        """Enter layers under their names; within one table no two entries share one."""
        for name in names:
            owners = self.entries.setdefault(flatten(name), {})
            known = owners.setdefault(entry.owner, entry)
            if known.parts != entry.parts:
                raise ValueError(f"{name} means {known.path} and {entry.path} in {entry.owner}")

    def get(self, flat: str) -> dict[str, Entry]:
        """The entries of a flattened name by owner; empty where no table knows it."""
        return self.entries.get(flat, {})
