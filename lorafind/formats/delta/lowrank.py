"""ΔW as a product of two matrices: LoRA, LoCon and its Tucker form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, flat, wide


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """LoRA and LoCon: ΔW = s·up·down; with ``mid`` the Tucker form of LoCon.

    up [o, r(, 1, 1)], down [r, i(, kh, kw)]; Tucker: down [r, i, 1, 1], mid [r, r, kh, kw].
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None
    #: Rank of the layer that this is a part of, 0 where it is whole.
    fused: int = field(default=0, compare=False)
    family: str = field(default="lora", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        n = math.prod(self.down.shape[1:])
        if self.mid is not None:
            n *= math.prod(self.mid.shape[2:])
        return self.up.shape[0], n

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def divisor(self) -> int:
        return self.fused or self.rank

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
        b = flat(self.up, dtype) * self.scale
        a = flat(self.down, dtype)
        if self.mid is not None:
            mid = wide(self.mid, dtype)
            a = torch.einsum("mn...,ni->mi...", mid, a).reshape(mid.shape[0], -1)
        return b, a

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        b, a = self.factors(dtype)
        return b @ a

    def tensors(self) -> dict[str, Tensor]:
        found = {"up": self.up, "down": self.down}
        return found if self.mid is None else {**found, "mid": self.mid}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        up, down = flat(self.up, F64), flat(self.down, F64)
        square = self.scale**2
        if self.mid is None:
            rows = rounding.variance(up) @ down.square().sum(1)
            columns = up.square().sum(0) @ rounding.variance(down)
            return torch.cat([rows, columns]).mul_(square)
        mid = wide(self.mid, F64).flatten(2)
        # What multiplies the error of one number of each tensor, from U = BᵀB and G = AAᵀ.
        u, g = up.T @ up, down @ down.T
        through_up = torch.einsum("mnk,np,mpk->m", mid, g, mid)
        through_down = torch.einsum("mnk,mp,pnk->n", mid, u, mid)
        middle = torch.einsum("m,mnk,n->mnk", u.diagonal(), rounding.variance(mid), g.diagonal())
        rows = rounding.variance(up) @ through_up
        columns = through_down @ rounding.variance(down)
        return torch.cat([rows, middle.flatten(), columns]).mul_(square)

    def _rows(self, start: int, stop: int) -> LowRank:
        """The rows of ``up``. Columns that are zero in them are left out with their rows of
        ``down``: in a layer fused of several adapters each part keeps its own rank. The scale
        stays, which was made of the whole rank.
        """
        up = self.up[start:stop].reshape(stop - start, -1)
        # What is not zero stays so; torch compares no numbers of eight bits.
        dtype = F64 if up.dtype is F64 else torch.float32
        # A few rows tell nearly always that no column is zero.
        if wide(up[:8], dtype).any(0).all():
            return replace(self, up=self.up[start:stop])
        used = wide(up, dtype).any(0).nonzero().flatten()
        if len(used) == up.shape[1]:
            return replace(self, up=self.up[start:stop])
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        keep = slice(first, last + 1) if last - first + 1 == max(1, len(used)) else used
        if self.mid is not None:
            return replace(self, up=up[:, keep], mid=self.mid[keep])
        return replace(self, up=up[:, keep], down=self.down[keep], fused=self.divisor)
