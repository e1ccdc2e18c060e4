"""ΔW as a product of two matrices with a diagonal between or before them: AdaLoRA, VeRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, flat, wide


@dataclass(frozen=True, eq=False)
class Diagonal(Delta):
    """ΔW = s·diag(outer)·up·diag(inner)·down, without ``outer`` where there is none.

    up [o, r], down [r, i(, kh, kw)], inner: r numbers in any shape, outer: o numbers.
    """

    up: Tensor
    inner: Tensor
    down: Tensor
    scale: float = 1.0
    outer: Tensor | None = None
    family: str = field(default="lora", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], math.prod(self.down.shape[1:])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def _stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """outer [o, 1], up, inner [r, 1], down."""
        up, down = flat(self.up, dtype), flat(self.down, dtype)
        inner = wide(self.inner, dtype).reshape(-1, 1)
        if self.outer is None:
            return torch.ones(len(up), 1, dtype=dtype), up, inner, down
        return wide(self.outer, dtype).reshape(-1, 1), up, inner, down

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
        outer, up, inner, down = self._stored(dtype)
        return outer * up * self.scale, inner * down

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        b, a = self.factors(dtype)
        return b @ a

    def tensors(self) -> dict[str, Tensor]:
        found = {"up": self.up, "inner": self.inner, "down": self.down}
        return found if self.outer is None else {**found, "outer": self.outer}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        outer, up, inner, down = self._stored(F64)
        b, a = outer * up, inner * down
        parts = [
            (outer.square() * rounding.variance(up)) @ a.square().sum(1),
            (b.square().sum(0) * inner.square().flatten()) @ rounding.variance(down),
            # One number of the inner diagonal moves a whole product of a column and a row.
            b.square().sum(0) * down.square().sum(1) * rounding.variance(inner.flatten()),
        ]
        if self.outer is not None:
            through = ((up @ (a @ a.T)) * up).sum(1)
            parts.append(rounding.variance(outer.flatten()) * through)
        return torch.cat(parts).mul_(self.scale**2)

    def _rows(self, start: int, stop: int) -> Diagonal:
        outer = None if self.outer is None else self.outer.reshape(-1)[start:stop]
        return replace(self, up=self.up[start:stop], outer=outer)
