"""The forms in which a file writes one module's ΔW, and exact access to it.

Every form is a small frozen object over the stored tensors (their stored dtype, never
copied). ΔW is out × in (o × n); a convolution is flattened to o × i·kh·kw.
Formulas: FORMATS of LyCORIS, kohya-ss/sd-scripts and ComfyUI; see each class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

F64 = torch.float64


@dataclass(frozen=True)
class Rounding:
    """Unit roundoff ``u`` and spacing of subnormals ``eta`` of a stored dtype.

    ``u`` bounds the relative error of a normal number; a number below the normal range is off by
    at most ``eta`` / 2. The error model of relations (see ``relations/core.py``) uses both.
    """

    u: float
    eta: float

    def variance(self, t: Tensor) -> Tensor:
        """Expected squared error of each number of ``t`` (float64) after one rounding.

        The error of a normal number x is uniform within ± u·2^⌊log₂|x|⌋; with mantissas spread
        evenly over the logarithm its square is u²x²·(1 − 1/4)/(6·ln 2) ≈ u²x²/6 on average.
        """
        return t.square().mul_(self.u**2 / 6).add_(self.eta**2 / 12)


ROUNDING = {
    "F64": Rounding(2.0**-53, 0.0),
    "F32": Rounding(2.0**-24, 2.0**-149),
    "F16": Rounding(2.0**-11, 2.0**-24),
    "BF16": Rounding(2.0**-8, 2.0**-133),
    "F8_E4M3": Rounding(2.0**-4, 2.0**-9),
    "F8_E5M2": Rounding(2.0**-3, 2.0**-16),
    "F8_E4M3FNUZ": Rounding(2.0**-4, 2.0**-10),
    "F8_E5M2FNUZ": Rounding(2.0**-3, 2.0**-17),
}


class Delta(ABC):
    """One module's ΔW. ``shape`` is (o, n); ``scale`` multiplies everything."""

    scale: float
    #: name of the family: ``lora``, ``loha``, ``lokr``, ``full``
    family: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (o, n) of ΔW."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank as the file states it (LoHa: of one factor); ``full``: min(o, n)."""

    @abstractmethod
    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        """ΔW as an o × n matrix, scale included."""

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        """(B, A) with ΔW = B·A, B o × r, A r × n, scale in B; None where there is no low rank."""
        return None

    def grams(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        """(BᵀB, A·Aᵀ) of :meth:`factors`, r × r; None where there are no factors."""
        if (pair := self.factors(dtype)) is None:
            return None
        b, a = pair
        return b.T @ b, a @ a.T

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by role, as they stand in the file (without alpha)."""

    @abstractmethod
    def rounding_parts(self, rounding: Rounding) -> Tensor:
        """Expected ‖error‖² of ΔW when every stored tensor was rounded once, as terms to be added.

        Float64, 1-D; the terms err independently of one another (a row of B, a column of A, or
        single numbers), so that their spread tells how far the sum can be off.
        """

    def squared_rounding(self, rounding: Rounding) -> float:
        """Expected ‖error‖² of ΔW when every stored tensor was rounded once."""
        return float(self.rounding_parts(rounding).sum())

    @cached_property
    def is_zero(self) -> bool:
        """True when ΔW is exactly zero."""
        if self.scale == 0.0:
            return True
        pair = self.factors(torch.float32)
        if pair is None:
            return not bool(self.dense(torch.float32).any())
        b, a = pair
        if not (b.any() and a.any()):
            return True
        # One row of the product decides nearly always; all of it is o·r·n work.
        strongest = int(b.abs().amax(1).argmax())
        return not bool((b[strongest] @ a).any()) and not bool((b @ a).any())

    def is_finite(self) -> bool:
        """True when no stored number nor the scale is NaN or infinite."""
        return math.isfinite(self.scale) and all(
            bool(torch.isfinite(_wide(t, torch.float32)).all()) for t in self.tensors().values()
        )

    def squared_norm(self) -> float:
        """‖ΔW‖² in float64 (Frobenius)."""
        pair = self.factors()
        if pair is None:
            return float(self.dense().square().sum())
        b, a = pair
        return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def _wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype)


def _flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    return _wide(t, dtype).reshape(t.shape[0], -1)


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """LoRA and LoCon: ΔW = s·up·down; with ``mid`` the Tucker form of LoCon.

    up [o, r(, 1, 1)], down [r, i(, kh, kw)]; Tucker: down [r, i, 1, 1], mid [r, r, kh, kw].
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    mid: Tensor | None = None
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

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
        b = _flat(self.up, dtype) * self.scale
        a = _flat(self.down, dtype)
        if self.mid is not None:
            mid = _wide(self.mid, dtype)
            a = torch.einsum("mnhw,ni->mihw", mid, a).reshape(mid.shape[0], -1)
        return b, a

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        b, a = self.factors(dtype)
        return b @ a

    def tensors(self) -> dict[str, Tensor]:
        found = {"up": self.up, "down": self.down}
        return found if self.mid is None else {**found, "mid": self.mid}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        up, down = _flat(self.up, F64), _flat(self.down, F64)
        square = self.scale**2
        if self.mid is None:
            rows = rounding.variance(up) @ down.square().sum(1)
            columns = up.square().sum(0) @ rounding.variance(down)
            return torch.cat([rows, columns]).mul_(square)
        mid = _wide(self.mid, F64).flatten(2)
        # What multiplies the error of one number of each tensor, from U = BᵀB and G = AAᵀ.
        u, g = up.T @ up, down @ down.T
        through_up = torch.einsum("mnk,np,mpk->m", mid, g, mid)
        through_down = torch.einsum("mnk,mp,pnk->n", mid, u, mid)
        middle = torch.einsum("m,mnk,n->mnk", u.diagonal(), rounding.variance(mid), g.diagonal())
        rows = rounding.variance(up) @ through_up
        columns = through_down @ rounding.variance(down)
        return torch.cat([rows, middle.flatten(), columns]).mul_(square)


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
            left, right = _wide(a, dtype), _flat(b, dtype)
            if t is not None:
                left = left.T
                core = _wide(t, dtype)
                right = torch.einsum("mnhw,ni->mihw", core, right).reshape(core.shape[0], -1)
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
            return _flat(self.w1, dtype)
        assert self.w1_a is not None and self.w1_b is not None
        return _wide(self.w1_a, dtype) @ _wide(self.w1_b, dtype)

    def right(self, dtype: torch.dtype = F64) -> Tensor:
        """w2 as a b × d·kh·kw matrix, without scale."""
        if self.w2 is not None:
            return _flat(self.w2, dtype)
        assert self.w2_a is not None and self.w2_b is not None
        if self.t2 is None:
            return _wide(self.w2_a, dtype) @ _flat(self.w2_b, dtype)
        core, a, b = (_wide(t, dtype) for t in (self.t2, self.w2_a, self.w2_b))
        return torch.einsum("mnhw,mb,nd->bdhw", core, a, b).reshape(a.shape[1], -1)

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

    def _split(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(P, Q, U, V) with w1 = P·Q and w2 = U·V, where that makes a low rank."""
        if self.w2 is not None or self.t2 is not None:
            return None
        assert self.w2_a is not None and self.w2_b is not None
        (a, c), _ = self._sizes
        if self.w1 is None and self.w1_a is not None and self.w1_b is not None:
            left, right = _wide(self.w1_a, dtype), _wide(self.w1_b, dtype)
        else:
            whole, eye = self.left(dtype), torch.eye(min(a, c), dtype=dtype)
            left, right = (whole, eye) if c <= a else (eye, whole)
        if left.shape[1] * self.w2_a.shape[1] * 2 >= min(self.shape):
            return None
        return left, right, _wide(self.w2_a, dtype), _flat(self.w2_b, dtype)

    def factors(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        # (P·Q) ⊗ (U·V) = (P ⊗ U)·(Q ⊗ V)
        if (parts := self._split(dtype)) is None:
            return None
        p, q, u, v = (t.contiguous() for t in parts)
        return torch.kron(p, u) * self.scale, torch.kron(q, v)

    def grams(self, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor] | None:
        # (P ⊗ U)ᵀ·(P ⊗ U) = PᵀP ⊗ UᵀU
        if (parts := self._split(dtype)) is None:
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
        return self.scale == 0.0 or not (bool(self.left().any()) and bool(self.right().any()))

    def squared_norm(self) -> float:
        return self.scale**2 * float(self.left().square().sum() * self.right().square().sum())

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        def parts(a: Tensor | None, b: Tensor | None, full: Tensor) -> Tensor:
            """The terms of one Kronecker factor."""
            if a is None or b is None:
                return rounding.variance(full).flatten()
            if self.t2 is not None and b is self.w2_b:
                # Three stored tensors in a product whose terms are nearly orthogonal.
                return 3 * rounding.variance(full).sum(0)
            a, b = _wide(a, F64), _flat(b, F64)
            rows = rounding.variance(a) @ b.square().sum(1)
            return torch.cat([rows, a.square().sum(0) @ rounding.variance(b)])

        one, two = self.left(), self.right()
        first = parts(self.w1_a, self.w1_b, one) * two.square().sum()
        second = parts(self.w2_a, self.w2_b, two) * one.square().sum()
        return torch.cat([first, second]).mul_(self.scale**2)


@dataclass(frozen=True, eq=False)
class Full(Delta):
    """``diff``: ΔW itself; bias and norm differences are o × 1."""

    diff: Tensor
    scale: float = 1.0
    family: str = field(default="full", compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.diff.shape[0], math.prod(self.diff.shape[1:])

    @property
    def rank(self) -> int:
        return min(self.shape)

    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        return _flat(self.diff, dtype) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.diff}

    def rounding_parts(self, rounding: Rounding) -> Tensor:
        return rounding.variance(_wide(self.diff, F64)).flatten().mul_(self.scale**2)
