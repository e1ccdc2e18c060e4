"""ΔW as a Hadamard product of two low-rank matrices: LoHa."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorafind.formats.delta.base import F64, Delta, Rounding, flat, wide


@dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """LoHa: ΔW = s·(w1a·w1b) ∘ (w2a·w2b); Tucker: each factor Σ_mn t[m,n,:]·a[m,o]·b[n,i].

    a [o, r], b [r, n]; Tucker: a [r, o], b [r, i], t [r, r, kh, kw].
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    t1: Tensor | None = None
    t2: Tensor | None = None
    family: str = field(default="loha", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        if self.t1 is None:
            return self.w1_a.shape[0], math.prod(self.w1_b.shape[1:])
        return self.w1_a.shape[1], self.w1_b.shape[1] * math.prod(self.t1.shape[2:])

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def _halves(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        halves = []
        for a, b, t in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            left, right = wide(a, dtype), flat(b, dtype)
            if t is not None:
                left = left.T
                core = wide(t, dtype)
                right = torch.einsum("mn...,ni->mi...", core, right).reshape(core.shape[0], -1)
            halves.append((left, right))
        return halves

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        (a1, b1), (a2, b2) = self._halves(dtype)
        o, n = self.shape
        rank = a1.shape[1] * a2.shape[1]
        if rank * 2 >= min(o, n):
            return None
        # A Hadamard product of two low-rank matrices has the row-wise Kronecker
        # products of their factors as factors.
        b = torch.einsum("or,os->ors", a1, a2).reshape(o, rank) * self.scale
        a = torch.einsum("rn,sn->rsn", b1, b2).reshape(rank, n)
        return b, a

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        (a1, b1), (a2, b2) = self._halves(dtype)
        return (a1 @ b1).mul_(a2 @ b2).mul_(self.scale)

    def tensors(self) -> dict[str, Tensor]:
        named = {
            "w1_a": self.w1_a,
            "w1_b": self.w1_b,
            "w2_a": self.w2_a,
            "w2_b": self.w2_b,
            "t1": self.t1,
            "t2": self.t2,
        }
        return {k: v for k, v in named.items() if v is not None}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        first, second = self._halves(F64)
        parts = []
        for (a, b), t, (c, d) in (
            (first, self.t1, second),
            (second, self.t2, first),
        ):
            other = (c @ d).square_()
            parts.append(((rounding.variance(a) @ b.square()) * other).sum(1))
            columns = ((a.square() @ rounding.variance(b)) * other).sum(0)
            # Tucker: b is a product of two stored tensors, each rounded once.
            parts.append(columns if t is None else 2 * columns)
        return torch.cat(parts).mul_(self.scale**2)

    def _rows(self, start: int, stop: int) -> Hadamard:
        if self.t1 is None:
            return replace(self, w1_a=self.w1_a[start:stop], w2_a=self.w2_a[start:stop])
        return replace(self, w1_a=self.w1_a[:, start:stop], w2_a=self.w2_a[:, start:stop])
