"""ΔW as a Kronecker product: LoKr."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lorafind.formats.delta.base import BLOCK, F64, Delta, Rounding, flat, wide

#: Factors of more numbers, made of small ones, are never made.
MOST = 2**25


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """LoKr: ΔW = s·w1 ⊗ w2, each whole or factored (w2 also as Tucker).

    w1 [a, c]; w2 [b, d(, kh, kw)]; ΔW is ab × cd·kh·kw. Tucker: w2_a [r, b], w2_b [r, d],
    t2 [r, r, kh, kw].
    """

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0
    family: str = field(default="lokr", compare=False)

    def left(self, dtype: torch.dtype = F64) -> Tensor:
        """w1 as an a × c matrix, without scale."""
        if self.w1 is not None:
            return flat(self.w1, dtype)
        assert self.w1_a is not None and self.w1_b is not None
        return wide(self.w1_a, dtype) @ wide(self.w1_b, dtype)

    def right(self, dtype: torch.dtype = F64) -> Tensor:
        """w2 as a b × d·kh·kw matrix, without scale."""
        if self.w2 is not None:
            return flat(self.w2, dtype)
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is None:
            return wide(self.w2_a, dtype) @ flat(self.w2_b, dtype)
        core, a, b = (wide(t, dtype) for t in (self.t2, self.w2_a, self.w2_b))
        return torch.einsum("mn...,mb,nd->bd...", core, a, b).reshape(a.shape[1], -1)

    @cached_property
    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.w1 is not None:
            one = (self.w1.shape[0], math.prod(self.w1.shape[1:]))
        else:
            assert self.w1_a is not None and self.w1_b is not None
            one = (self.w1_a.shape[0], self.w1_b.shape[1])
        if self.w2 is not None:
            two = (self.w2.shape[0], math.prod(self.w2.shape[1:]))
        else:
            assert self.w2_a is not None and self.w2_b is not None
            if self.t2 is None:
                two = (self.w2_a.shape[0], math.prod(self.w2_b.shape[1:]))
            else:
                two = (self.w2_a.shape[1], self.w2_b.shape[1] * math.prod(self.t2.shape[2:]))
        return one, two

    @property
    def shape(self) -> tuple[int, int]:
        (a, c), (b, d) = self._sizes
        return a * b, c * d

    @property
    def rank(self) -> int:
        for factor in (self.w2_b, self.w1_b):
            if factor is not None:
                return factor.shape[0]
        return min(self.shape)

    def split(self, dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(P, Q, U, V) with w1 = P·Q and w2 = U·V, where their rank is below half of ``width``.

        None also where P ⊗ U or Q ⊗ V would be large, however small the file.
        """
        if self.w2 is not None or self.t2 is not None:
            return None
        assert self.w2_a is not None and self.w2_b is not None
        (a, c), _ = self._sizes
        if self.w1 is None and self.w1_a is not None and self.w1_b is not None:
            left, right = wide(self.w1_a, dtype), wide(self.w1_b, dtype)
        else:
            whole, eye = self.left(dtype), torch.eye(min(a, c), dtype=dtype)
            left, right = (whole, eye) if c <= a else (eye, whole)
        rank = left.shape[1] * self.w2_a.shape[1]
        if rank * 2 >= width or rank * max(self.shape) > MOST:
            return None
        return left, right, wide(self.w2_a, dtype), flat(self.w2_b, dtype)

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        # (P·Q) ⊗ (U·V) = (P ⊗ U)·(Q ⊗ V)
        if (parts := self.split(dtype, min(self.shape))) is None:
            return None
        p, q, u, v = (t.contiguous() for t in parts)
        return torch.kron(p, u) * self.scale, torch.kron(q, v)

    def grams(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        # (P ⊗ U)ᵀ·(P ⊗ U) = PᵀP ⊗ UᵀU
        if (parts := self.split(dtype, min(self.shape))) is None:
            return None
        p, q, u, v = parts
        return torch.kron(p.T @ p, u.T @ u) * self.scale**2, torch.kron(q @ q.T, v @ v.T)

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        return torch.kron(self.left(dtype).contiguous(), self.right(dtype).contiguous()).mul_(
            self.scale
        )

    def tensors(self) -> dict[str, Tensor]:
        names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        return {k: t for k in names if (t := getattr(self, k)) is not None}

    @cached_property
    def is_zero(self) -> bool:
        return self.scale == 0.0 or not all(
            any(bool(part.any()) for part in self._rows_of(factor)) for factor in (1, 2)
        )

    def squared_norm(self) -> float:
        one, two = (
            sum(float(part.square().sum()) for part in self._rows_of(factor)) for factor in (1, 2)
        )
        return self.scale**2 * one * two

    def _rows_of(self, factor: int) -> Iterator[Tensor]:
        """w1 or w2 a few rows at a time, float64."""
        if factor == 1:
            return self._pieces(self.w1, self.w1_a, self.w1_b)
        return self._pieces(self.w2, self.w2_a, self.w2_b, self.t2)

    @staticmethod
    def _pieces(
        whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None
    ) -> Iterator[Tensor]:
        if whole is not None:
            yield from (flat(part, F64) for part in whole.split(BLOCK))
            return
        assert a is not None and b is not None
        if core is None:
            yield from (wide(part, F64) @ flat(b, F64) for part in a.split(BLOCK))
            return
        for part in a.split(BLOCK, 1):
            yield torch.einsum("mn...,mb,nd->bd...", wide(core, F64), wide(part, F64), wide(b, F64))

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        one, two = self.left(), self.right()
        left = two.square().sum().expand(one.shape[0])
        right = one.square().sum().expand(two.shape[0])
        return self.errors(rounding, left, right)

    def errors(self, rounding: Rounding, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`rounding_parts` where the error of a row of w1 counts by ``left``, [a], and that
        of a row of w2 by ``right``, [b]: the squared norm of what the row is multiplied with.
        """

        def parts(a: Tensor | None, b: Tensor | None, full: Tensor, weight: Tensor) -> Tensor:
            """The terms of one Kronecker factor."""
            if a is None or b is None:
                return (rounding.variance(full) * weight[:, None]).flatten()
            if self.t2 is not None and b is self.w2_b:
                # Three stored tensors in a product whose terms are nearly orthogonal.
                return 3 * (weight @ rounding.variance(full))
            a, b = wide(a, F64), flat(b, F64)
            rows = (rounding.variance(a) @ b.square().sum(1)) * weight
            return torch.cat([rows, (weight @ a.square()) @ rounding.variance(b)])

        first = parts(self.w1_a, self.w1_b, self.left(), left)
        second = parts(self.w2_a, self.w2_b, self.right(), right)
        return torch.cat([first, second]).mul_(self.scale**2)

    def _rows(self, start: int, stop: int) -> Delta:
        height = self._sizes[1][0]
        first, last = start // height, -(-stop // height)
        outer = replace(
            self,
            w1=None if self.w1 is None else self.w1[first:last],
            w1_a=None if self.w1_a is None else self.w1_a[first:last],
        )
        start, stop = start - first * height, stop - first * height
        if start == 0 and stop == (last - first) * height:
            return outer
        if last - first > 1:
            return KroneckerRows(outer, start, stop)
        w2_a = self.w2_a
        if w2_a is not None:
            w2_a = w2_a[start:stop] if self.t2 is None else w2_a[:, start:stop]
        return replace(outer, w2=None if self.w2 is None else self.w2[start:stop], w2_a=w2_a)


@dataclass(frozen=True, eq=False)
class KroneckerRows(Delta):
    """Rows of a Kronecker product that begin or end within a row of w1.

    whole: the rows of w1 that are touched, at least two, with all of w2; start, stop: rows of it.
    Row ρ is w1[ρ div b] ⊗ w2[ρ mod b], so that no more than the block is ever made.
    """

    whole: Kronecker
    start: int
    stop: int
    family: str = field(default="lokr", compare=False)

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.whole.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.whole.shape[1]

    @property
    def rank(self) -> int:
        return min(self.whole.rank, *self.shape)

    @property
    def divisor(self) -> int:
        return self.whole.divisor

    def _product(self, one: Tensor, two: Tensor) -> Tensor:
        """The block of one ⊗ two, whose rows are those of w1 and of w2."""
        height = two.shape[0]
        row = torch.arange(self.start, self.stop)
        left, right = one[row // height], two[row % height]
        return torch.einsum("ri,rj->rij", left, right).reshape(len(row), -1)

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        if (parts := self.whole.split(dtype, min(self.shape))) is None:
            return None
        p, q, u, v = parts
        b = self._product(p, u).mul_(self.scale)
        return b, torch.kron(q.contiguous(), v.contiguous())

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        return self._product(self.whole.left(dtype), self.whole.right(dtype)).mul_(self.scale)

    def tensors(self) -> dict[str, Tensor]:
        # Equal tensors are an equal block only where it begins and ends in the same places.
        place = f"[{self.start}:{self.stop}]"
        return {f"{role}{place}": t for role, t in self.whole.tensors().items()}

    def _weights(self) -> tuple[Tensor, Tensor]:
        """For each row of w1 the squared norm of the rows of w2 that it meets, and vice versa."""
        one, two = (t.square().sum(1) for t in (self.whole.left(), self.whole.right()))
        height = len(two)
        left = two.sum().repeat(len(one))
        left[0] = two[self.start :].sum()
        end = self.stop - (len(one) - 1) * height
        left[-1] = two[:end].sum()
        right = one.sum().repeat(height)
        right[: self.start] -= one[0]
        right[end:] -= one[-1]
        return left, right.clamp_(min=0.0)

    @cached_property
    def is_zero(self) -> bool:
        return self.scale == 0.0 or not self.squared_norm()

    def squared_norm(self) -> float:
        one = self.whole.left().square().sum(1)
        return self.scale**2 * float(one @ self._weights()[0])

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        return self.whole.errors(rounding, *self._weights())

    def _rows(self, start: int, stop: int) -> Delta:
        return self.whole.rows(self.start + start, self.start + stop)
