"""What a table of names is: true module names of one network, with shapes and aliases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

#: (o, n) of a weight: a convolution flattened to o × i·kh·kw, a norm o × 1.
Shape = tuple[int, int]


def flatten(name: str) -> str:
    """The spelling of a name in which dotted and underscored ones meet."""
    return name.replace(".", "_").rstrip("_")


@dataclass(frozen=True, slots=True)
class Entry:
    """One layer of a network. owner: the table's key; path: its true (diffusers) name."""

    owner: str
    path: str
    shape: Shape
    norm: bool = False
    sgm: bool = False

    def fits(self, shape: Shape, kind: str) -> bool:
        """True where a ΔW of this shape can belong here; kind as in :data:`KINDS`."""
        if kind == "bias":
            return shape == (self.shape[0], 1)
        return shape == self.shape and self.norm == (kind == "norm")


#: ``weight``: of a linear layer or convolution; ``norm``: 1-D weight of a norm; ``bias``.
KINDS = ("weight", "norm", "bias")


@dataclass
class Index:
    """Flattened name → the entries of every table that has it, by owner."""

    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def add(self, entry: Entry, names: Iterable[str]) -> None:
        """Enter a layer under its names; within one table no two layers share one."""
        for name in names:
            owners = self.entries.setdefault(flatten(name), {})
            known = owners.setdefault(entry.owner, entry)
            if known.path != entry.path:
                raise ValueError(f"{name} means {known.path} and {entry.path} in {entry.owner}")

    def get(self, flat: str) -> dict[str, Entry]:
        """The entries of a flattened name by owner; empty where no table knows it."""
        return self.entries.get(flat, {})
