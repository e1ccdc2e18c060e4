"""Adapters made in memory, with the layers of a table under any of their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafind.files.safetensors import TensorInfo
from lorafind.files.tensors import NAMES
from lorafind.formats.adapter import Adapter
from lorafind.formats.names.pattern import outline
from lorafind.formats.names.table import Entry, flatten
from lorafind.formats.names.tables import Table
from lorafind.formats.plan import understand
from lorafind.signatures.device import choose
from lorafind.signatures.features import Signature, signature
from lorafind.signatures.sketch import Sketcher

#: Canonical path → (up, down) of ΔW = up·down.
Factors = dict[str, tuple[Tensor, Tensor]]


def adapter(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, dtype: str = "F32"
) -> Adapter:
    """An adapter of tensors that no file holds."""
    headers = {key: TensorInfo(NAMES[t.dtype], tuple(t.shape), 0, 0) for key, t in tensors.items()}
    return Adapter(understand(headers, metadata or {}), dict(tensors).__getitem__, dtype, dtype)


def sketched(made: Adapter) -> Signature:
    """Its signature."""
    sketcher = Sketcher(choose("cpu"))
    sketcher.add((m.place, m.bind(made.fetch)) for m in made.plan.modules)
    return signature(sketcher)


def apart(one: Adapter, two: Adapter) -> float:
    """The largest relative distance between two signatures, over their parts."""
    a, b = sketched(one), sketched(two)
    assert a.style.keys() == b.style.keys()
    pairs = [(a.identity, b.identity), *((a.style[g], b.style[g]) for g in a.style)]
    return max(float(np.linalg.norm(x - y) / np.linalg.norm(x)) for x, y in pairs)


@dataclass
class Sample:
    """A few layers of a table, with some of their names in every spelling.

    layers: canonical path → shape; names: spelling → entry's name → the entry.
    """

    layers: dict[str, tuple[int, int]]
    names: dict[str, dict[str, Entry]]


def sample(table: Table) -> Sample:
    """One layer, and one fused layer, of every kind that a table knows; norms are left out."""
    layers: dict[str, tuple[int, int]] = {}
    names: dict[str, dict[str, Entry]] = {}
    seen = set()
    for name, entry in table.entries():
        kind = entry.spelling, outline(flatten(name)).text
        if entry.parts[0].norm or kind in seen:
            continue
        seen.add(kind)
        layers |= {layer.path: layer.shape for layer in entry.parts}
        names.setdefault(entry.spelling, {})[name] = entry
    return Sample(layers, names)


def factors(layers: Mapping[str, tuple[int, int]], rank: int = 2, seed: int = 0) -> Factors:
    """Random factors."""
    g = torch.Generator().manual_seed(seed)
    return {
        path: (torch.randn(o, rank, generator=g), torch.randn(rank, n, generator=g))
        for path, (o, n) in layers.items()
    }


def named(chosen: Sample, spelling: str) -> list[tuple[str, tuple[str, ...]]]:
    """(name, its layers): every layer once, in a spelling as far as that has a name for it."""
    left = set(chosen.layers)
    found = []
    for name, entry in chosen.names.get(spelling, {}).items():
        paths = tuple(layer.path for layer in entry.parts)
        if left >= set(paths):
            left -= set(paths)
            found.append((name, paths))
    return [*found, *((path, (path,)) for path in chosen.layers if path in left)]


def fused(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several layers as one of block-diagonal form: B zero but for every layer's own block."""
    ups, downs = zip(*pairs, strict=True)
    return torch.block_diag(*ups), torch.cat(downs)


def kohya(name: str, up: Tensor, down: Tensor, alpha: float | None) -> dict[str, Tensor]:
    """The tensors of a layer with sd-scripts' suffixes."""
    found = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return found if alpha is None else {**found, f"{name}.alpha": torch.tensor(alpha)}


def peft(name: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer with PEFT's suffixes."""
    return {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
