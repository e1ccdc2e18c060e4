"""ΔW as a low-rank product and a few single numbers: what LyCORIS extracts with a sparse bias."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, wide


@dataclass(frozen=True, eq=False)
class Residual(Delta):
    """ΔW = s·(up·down + E), E of o × n with a number of ``values`` at each column of ``indices``.

    product: the low-rank part, with s; indices [2, k] (row, column; of k numbers), values [k]. Two
    numbers in one place add up.
    """

    product: Delta
    indices: Tensor
    values: Tensor
    family: str = field(default="full", compare=False)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.product.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.product.shape

    @property
    def rank(self) -> int:
        return self.product.rank

    def _residual(self, dtype: torch.dtype) -> Tensor:
        """E as a matrix."""
        found = torch.zeros(self.shape, dtype=dtype)
        rows, columns = self.indices.long()
        return found.index_put_((rows, columns), wide(self.values, dtype), accumulate=True)

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        return self.product.dense(dtype).add_(self._residual(dtype), alpha=self.scale)

    def tensors(self) -> dict[str, Tensor]:
        # Where the numbers stand is part of what they say, and so is the scale: in a sum it cannot
        # be moved from one tensor to another.
        residual = self._residual(torch.float32).to(self.values.dtype)
        return {**self.product.tensors(), f"residual ×{self.scale!r}": residual}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        single = rounding.variance(wide(self.values, F64)).mul_(self.scale**2)
        return torch.cat([self.product.rounding_parts(rounding), single])

    def _rows(self, start: int, stop: int) -> Residual:
        inside = (self.indices[0] >= start) & (self.indices[0] < stop)
        indices = self.indices.long()[:, inside]
        indices[0] -= start
        return replace(
            self,
            product=self.product.rows(start, stop),
            indices=indices,
            values=self.values[inside],
        )
