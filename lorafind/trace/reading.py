"""The target and the candidates of a pursuit, kept in memory as far as that is little."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lorafind.formats.adapter import Adapter
from lorafind.formats.delta import ROUNDING, Delta, LowRank
from lorafind.formats.delta.base import flat
from lorafind.relations.core import precision
from lorafind.trace.spaces import Pair, Part, Space

#: Numbers of the target's factors and spaces that are kept (8 bytes each), and bytes of stored
#: tensors of candidates; what is beyond is read again. Adapters that are held open at most.
NUMBERS, BYTES, SHELF = 1 << 25, 512 << 20, 1024


class Target:
    """An adapter as (name, shape, part, space) per module, in the order of its plan."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.shapes = {m.name: m.shape for m in adapter.plan.modules if not m.parameters}
        self._kept: dict[str, tuple[Part, Space]] = {}
        self._room = NUMBERS

    def __iter__(self) -> Iterator[tuple[str, tuple[int, int], Part, Space]]:
        for name, shape in self.shapes.items():
            yield name, shape, *self._at(name)

    def _at(self, name: str) -> tuple[Part, Space]:
        if name in self._kept:
            return self._kept[name]
        delta = self.adapter.modules[name]
        part = Part.of(delta)
        space = Space(part, _noise(delta, self.adapter) if part.pair is not None else None)
        size = 2 * (space.u.numel() + space.v.numel())
        if size <= self._room:
            self._room -= size
            self._kept[name] = part, space
        return part, space


def _noise(delta: Delta, adapter: Adapter) -> Pair | None:
    """See :class:`lorafind.trace.spaces.Space`; None for forms that are no plain B·A."""
    if type(delta) is not LowRank or delta.mid is not None:
        return None
    rounding = ROUNDING[precision(delta, adapter.effective_dtype)]
    up, down = flat(delta.up, torch.float64), flat(delta.down, torch.float64)
    return rounding.variance(up).sum(0) * delta.scale**2, rounding.variance(down).sum(1)


class Shelf:
    """Adapters by number, the latest SHELF of them, with stored tensors up to BYTES in all.

    open_lora: opens one, None where it cannot be read as it was indexed.
    """

    def __init__(self, open_lora: Callable[[int], Adapter | None]) -> None:
        self._open = open_lora
        self._room = BYTES
        self._held: dict[int, Adapter | None] = {}

    def get(self, number: int) -> Adapter | None:
        """The adapter, opened where it is not at hand."""
        if number not in self._held:
            if len(self._held) >= SHELF:
                self._held.clear()
                self._room = BYTES
            adapter = self._open(number)
            self._held[number] = adapter and self._hold(adapter)
        return self._held[number]

    def _hold(self, adapter: Adapter) -> Adapter:
        kept: dict[str, Tensor] = {}
        read = adapter.fetch

        def fetch(key: str) -> Tensor:
            if key in kept:
                return kept[key]
            tensor = read(key)
            size = tensor.numel() * tensor.element_size()
            if size <= self._room:
                self._room -= size
                kept[key] = tensor
            return tensor

        return replace(adapter, fetch=fetch)
