"""A feature of n LoRAs as a matrix that is never whole in memory: tiles of columns, and the Gram.

Column tiles are what makes the principal components of long vectors cheap: X·Xᵀ is a sum over
tiles, and so every byte is read once for the Gram matrix and once more for the components, however
many LoRAs there are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from lorafind.index.progress import Progress, Silent

#: Bytes of one tile as n × c float32; two are in memory at a time, one of them being read.
TILE = 192 << 20
#: Columns of a tile: sums of more numbers in float32 lose digits.
MOST_COLUMNS = 1 << 16
#: Rows of a block of the product.
_ROWS = 512


class Saved(Protocol):
    """Keeps the sum of the tiles so far, so that an interrupted run goes on from it."""

    def load(self, group: str) -> tuple[int, np.ndarray] | None:
        """(tiles summed, n × n float64), None where nothing is kept."""

    def save(self, group: str, done: int, total: np.ndarray, last: bool) -> None:
        """Keep the sum of ``done`` tiles; it may be left out unless it is the last."""


class Matrix(ABC):
    """n LoRAs × the numbers of a feature, group by group.

    feature: its name; count: n; groups: in the order of GROUPS; present: group → n bools; widths:
    group → d_g; fingerprint: hex digest of all that the numbers are a function of.
    """

    feature: str
    count: int
    groups: tuple[str, ...]
    present: Mapping[str, np.ndarray]
    widths: Mapping[str, int]
    fingerprint: str

    @abstractmethod
    def columns(self, group: str, tile: slice) -> np.ndarray:
        """Columns tile.start to tile.stop of a group: n × c float32, zeros where it is absent.

        The array is the caller's own.
        """

    def tiles(self, group: str) -> list[slice]:
        """Ranges that cover the columns of a group, each within TILE bytes."""
        width = self.widths[group]
        step = max(1, min(MOST_COLUMNS, TILE // (4 * max(1, self.count))))
        return [slice(i, min(i + step, width)) for i in range(0, width, step)]

    def walk(self, group: str, start: int = 0) -> Iterator[tuple[slice, np.ndarray]]:
        """The tiles of a group from ``start`` on; the next is read while one is worked on."""
        tiles = self.tiles(group)[start:]
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self.columns, group, tile) for tile in tiles[:1]]
            for k, tile in enumerate(tiles):
                block = ahead.pop().result()
                if k + 1 < len(tiles):
                    ahead.append(reader.submit(self.columns, group, tiles[k + 1]))
                yield tile, block

    def gram(
        self,
        group: str,
        device: str = "cpu",
        watch: Progress | None = None,
        saved: Saved | None = None,
    ) -> np.ndarray:
        """X·Xᵀ of a group, n × n float64: float32 products of tiles, added up in float64."""
        watch = watch or Silent()
        kept = saved.load(group) if saved else None
        done, total = kept or (0, np.zeros((self.count, self.count)))
        number = len(self.tiles(group))
        watch.advance(done, 0)
        for tile, block in self.walk(group, done):
            add_product(total, block, self.present[group], device)
            done += 1
            watch.advance(1, 4 * self.count * (tile.stop - tile.start))
            if saved:
                saved.save(group, done, total, done == number)
        return total


def add_product(
    total: np.ndarray, block: np.ndarray, present: np.ndarray, device: str = "cpu"
) -> None:
    """total += block·blockᵀ; ``block`` (n × c float32) is overwritten, its absent rows are zero.

    LoRAs that began at one random start share most of their numbers, which centring takes off
    later. A float32 product of them would lose what they differ in; so the mean μ of the rows is
    taken off first, and with X = P·μᵀ + C the rest, P·(Cμ)ᵀ + (Cμ)·Pᵀ + |μ|²·P·Pᵀ, is added in
    float64. On the CPU one triangle is computed.
    """
    share = present / max(present.sum(), 1)
    mean = share.astype(np.float32) @ block
    # Indexing with the mask would copy the block.
    block[slice(None) if present.all() else present] -= mean
    along = (block @ mean).astype(np.float64)
    square = float(mean.astype(np.float64) @ mean)
    total += np.outer(present, along) + np.outer(along, present)
    total += square * np.outer(present, present)
    if not device.startswith("cuda"):
        for i in range(0, len(block), _ROWS):
            rows = block[i : i + _ROWS]
            for j in range(0, i + 1, _ROWS):
                part = rows @ block[j : j + _ROWS].T
                total[i : i + _ROWS, j : j + _ROWS] += part
                if i != j:
                    total[j : j + _ROWS, i : i + _ROWS] += part.T
        return
    import torch

    there = torch.from_numpy(block).pin_memory().to(device, non_blocking=True)
    total += (there @ there.T).double().cpu().numpy()
