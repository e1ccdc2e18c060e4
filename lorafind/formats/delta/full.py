"""ΔW as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, flat, wide


@dataclass(frozen=True, eq=False)
class Full(Delta):
    """``diff``: ΔW itself; bias and norm differences are o × 1.

    ``offset`` is added before the scale: −1 where the file holds factors, so that what changes
    nothing is zero.
    """

    diff: Tensor
    scale: float = 1.0
    offset: float = 0.0
    family: str = field(default="full", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], math.prod(self.diff.shape[1:])

    @property
    def rank(self) -> int:
        return min(self.shape)

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        found = flat(self.diff, dtype)
        if self.offset:
            found = found + self.offset
        return found * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {f"diff{self.offset:+g}" if self.offset else "diff": self.diff}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        return rounding.variance(wide(self.diff, F64)).flatten().mul_(self.scale**2)

    def _rows(self, start: int, stop: int) -> Full:
        return replace(self, diff=self.diff[start:stop])


@dataclass(frozen=True, eq=False)
class Value(Full):
    """A weight that takes the place of the base model's: zero is a value like others."""

    @property
    def is_zero(self) -> bool:
        return False
