"""Which layouts of unknown models are one architecture.

A layout of an unknown model is called ``other:<8 hex>`` after itself, so that a LoRA that touches
only some of a model's modules would seem to be of another. Two layouts are of one model when no
module has the same name and another shape in them, and at least half of the smaller one's modules
are among the larger's. The name of the largest stands for all; the outcome depends only on the
set of layouts, never on the order in which they came.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorafind.formats.architectures import candidates
from lorafind.index.rows import Module
from lorafind.index.store import Store

OTHER = "other:"
#: The share of a layout's modules that a class must have for the layout to join it.
SHARED = 0.5

#: The architectures that a LoRA may be of.
kinds = candidates


def comparable(a: str, b: str) -> bool:
    """True where two LoRAs may be of one architecture."""
    return a == b or not set(kinds(a)).isdisjoint(kinds(b))


def series_of(architecture: str) -> str:
    """The key of the identity series of an architecture.

    All known models share one (called after those that were there first), as a LoRA may leave open
    which of them it is for; unknown models share another.
    """
    return "other" if architecture.startswith(OTHER) else "sd"


@dataclass
class Model:
    """An unknown model, as far as its LoRAs show it: module name → shape."""

    name: str
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def takes(self, modules: Iterable[Module]) -> bool:
        """True where a layout belongs to this model."""
        total = shared = 0
        for module in modules:
            total += 1
            shape = self.shapes.get(module.name)
            if shape is None:
                continue
            if shape != (module.o, module.n):
                return False
            shared += 1
        return total > 0 and shared >= SHARED * total


def models(store: Store) -> tuple[list[Model], dict[int, str]]:
    """The unknown models of an index, and layout id → name of its model."""
    rows = store.conn.execute(
        "SELECT id, digest FROM layouts WHERE architecture LIKE ? || '%'", (OTHER,)
    ).fetchall()
    layouts = [(digest, number, *store.layout(number)) for number, digest in rows]
    layouts.sort(key=lambda row: (-len(row[3]), row[0]))
    found: list[Model] = []
    names: dict[int, str] = {}
    for _, number, own, modules in layouts:
        model = next((m for m in found if m.takes(modules)), None)
        if model is None:
            model = Model(own)
            found.append(model)
        model.shapes.update({m.name: (m.o, m.n) for m in modules})
        names[number] = model.name
    return found, names


def settle(store: Store) -> None:
    """Write the architecture of every LoRA of an unknown model anew."""
    _, names = models(store)
    with store.batch():
        store.conn.executemany(
            "UPDATE loras SET architecture = ? WHERE layout = ? AND architecture != ?",
            [(name, number, name) for number, name in names.items()],
        )
