"""Features that are whole in memory, for tests of what is done with them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lorafind.features.matrix import Matrix


class Dense(Matrix):
    """Matrices group → n × d_g as a feature; counts the tiles that are read."""

    def __init__(
        self, blocks: Mapping[str, np.ndarray], step: int = 64, feature: str = "delta"
    ) -> None:
        self.blocks, self.step = blocks, step
        self.feature = feature
        self.groups = tuple(blocks)
        self.count = len(next(iter(blocks.values())))
        self.present = {g: np.asarray(rows.any(1)) for g, rows in blocks.items()}
        self.widths = {g: rows.shape[1] for g, rows in blocks.items()}
        self.fingerprint = "dense"
        self.reads = 0

    def tiles(self, group: str) -> list[slice]:
        """Ranges of ``step`` columns."""
        width = self.widths[group]
        return [slice(i, min(i + self.step, width)) for i in range(0, width, self.step)]

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """n × c float32."""
        self.reads += 1
        return self.blocks[group][:, tile].astype(np.float32)


def styles(
    artists: int, each: int, width: int, signal: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(rows, artist of each row): LoRAs of an artist share a direction of length ``signal``."""
    rng = np.random.default_rng(seed)
    artist = np.repeat(np.arange(artists), each)
    shared = rng.normal(size=(artists, width)) / np.sqrt(width)
    own = rng.normal(size=(len(artist), width)) / np.sqrt(width)
    return signal * shared[artist] + own, artist
