"""Parameters of rotations and rescalings of a weight: matrices to compare, no ΔW."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, wide


@dataclass(frozen=True, eq=False)
class Skew(Delta):
    """The skew-symmetric parts Q of blocks, one below the other: (blocks·b) × b.

    blocks [..., b, b]: Q = s·(B − Bᵀ); triangles [n, b·(b − 1)/2], given ``side`` = b: the numbers
    above the diagonal of Q/s, row by row. What else B holds does not act.
    """

    blocks: Tensor
    scale: float = 1.0
    side: int = 0
    family: str = field(default="oft", compare=False)

    @property
    def _size(self) -> int:
        return self.side or self.blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        count = self.blocks.shape[0] if self.side else math.prod(self.blocks.shape[:-2])
        return count * self._size, self._size

    @property
    def rank(self) -> int:
        return self._size

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        b = self._size
        stored = wide(self.blocks, dtype)
        if self.side:
            square = torch.zeros(len(stored), b, b, dtype=dtype)
            row, column = torch.triu_indices(b, b, 1)
            square[:, row, column] = stored
        else:
            square = stored.reshape(-1, b, b)
        return (square - square.mT).mul_(self.scale).reshape(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"triangles" if self.side else "blocks": self.blocks}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        # A number beside the diagonal stands in two places.
        error = rounding.variance(wide(self.blocks, F64))
        if not self.side:
            error = error.reshape(-1, self._size, self._size)
            error.diagonal(dim1=1, dim2=2).zero_()
        return error.flatten().mul_(2 * self.scale**2)

    def _rows(self, start: int, stop: int) -> Delta:
        b = self._size
        if start % b or stop % b:
            raise ValueError(f"rows {start} to {stop} cut a block of {b}")
        blocks = self.blocks if self.side else self.blocks.reshape(-1, b, b)
        return replace(self, blocks=blocks[start // b : stop // b])


@dataclass(frozen=True, eq=False)
class Gain(Delta):
    """Factors of the outputs (first column) or of the inputs (second) of a layer: c × 2.

    gain: c numbers in any shape. ``offset`` is added, −1 where the numbers multiply: what changes
    nothing is zero.
    """

    gain: Tensor
    inputs: bool
    offset: float = 0.0
    scale: float = 1.0
    family: str = field(default="ia3", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.gain.numel(), 2

    @property
    def rank(self) -> int:
        return 1

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
        b = (wide(self.gain, dtype).reshape(-1, 1) + self.offset) * self.scale
        return b, torch.tensor([[float(not self.inputs), float(self.inputs)]], dtype=dtype)

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        b, a = self.factors(dtype)
        return b @ a

    def tensors(self) -> dict[str, Tensor]:
        return {f"{'in' if self.inputs else 'out'}{self.offset:+g}": self.gain}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        return rounding.variance(wide(self.gain, F64)).flatten().mul_(self.scale**2)

    def _rows(self, start: int, stop: int) -> Gain:
        return replace(self, gain=self.gain.reshape(-1)[start:stop])
