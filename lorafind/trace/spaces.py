"""The row and column spaces of one module, and what another module has outside of them.

With ΔW = U·Σ·Vᵀ of rank r, the matrices that a best approximation of rank r cannot have lost are
X − (I − UUᵀ)·X·(I − VVᵀ): the tangent space of the matrices of rank r at ΔW. If ΔW is the best
approximation of a sum S, then ΔW and S agree there exactly (Eckart and Young 1936).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafind.formats.delta import Delta

#: Singular values below this share of the largest are rounding, and no direction.
NO_DIRECTION = 1e-6
#: Directions of a parent that are compared: down to this share of its largest singular value.
STRONG = 0.05

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """One module in float64. pair: (B, A) with ΔW = B·A, None where only ``whole`` is known."""

    pair: Pair | None
    whole: Tensor | None = None

    @classmethod
    def of(cls, delta: Delta) -> Part:
        """Factors where the form has them and they are small, ΔW itself elsewhere."""
        pair = delta.factors()
        if pair is None or pair[0].shape[1] > min(delta.shape):
            return cls(None, delta.dense())
        return cls(pair)

    def dense(self) -> Tensor:
        """ΔW, o × n."""
        if self.pair is None:
            assert self.whole is not None
            return self.whole
        return self.pair[0] @ self.pair[1]

    def times(self, c: float) -> Part:
        """c·ΔW."""
        if self.pair is None:
            return Part(None, self.dense() * c)
        return Part((self.pair[0] * c, self.pair[1]))

    @classmethod
    def total(cls, parts: list[Part]) -> Part:
        """The sum, by factors where all have them and that is less."""
        pairs = [part.pair for part in parts if part.pair is not None]
        if len(pairs) < len(parts):
            return cls(None, torch.stack([part.dense() for part in parts]).sum(0))
        b = torch.cat([pair[0] for pair in pairs], 1)
        a = torch.cat([pair[1] for pair in pairs])
        return cls((b, a)) if b.shape[1] <= min(len(b), a.shape[1]) else cls(None, b @ a)


def inner(x: Part, y: Part) -> float:
    """⟨X, Y⟩ through the factors where both have them."""
    if x.pair is None or y.pair is None:
        return float((x.dense() * y.dense()).sum())
    (b, a), (d, c) = x.pair, y.pair
    return float(((b.T @ d) * (a @ c.T)).sum())


class Space:
    """U (o × r), the singular values and V (n × r) of a module; ``rank`` is the numerical one."""

    def __init__(self, part: Part, noise: Pair | None = None) -> None:
        """noise: expected ‖rounding error‖² of the columns of B and of the rows of A (r and r)."""
        self.stored: tuple[Pair, Pair] | None = None
        if part.pair is None:
            # Without factors the rank is taken as full: nothing can lie outside.
            self.limit = self.rank = min(part.dense().shape)
            self.u = self.v = self.values = torch.empty(0, 0, dtype=torch.float64)
            return
        else:
            left, right = torch.linalg.qr(part.pair[0]), torch.linalg.qr(part.pair[1].T)
            inside, values, vt = torch.linalg.svd(left.R @ right.R.T)
            u, v = left.Q @ inside, right.Q @ vt.T
        self.limit = min(len(u), len(v))
        self.rank = int((values > NO_DIRECTION * values[:1]).sum()) if len(values) else 0
        self.u, self.v, self.values = u[:, : self.rank], v[:, : self.rank], values[: self.rank]
        if noise is not None and self.rank == part.pair[0].shape[1]:
            self.stored = part.pair, noise

    @property
    def full(self) -> bool:
        """True where nothing can be outside."""
        return self.rank == self.limit

    def outside(self, part: Part) -> Part | None:
        """(I − UUᵀ)·X·(I − VVᵀ), None where it is nothing."""
        if self.full:
            return None
        if part.pair is None:
            x = part.dense()
            x = x - self.u @ (self.u.T @ x)
            return Part(None, x - (x @ self.v) @ self.v.T)
        b, a = part.pair
        return Part((b - self.u @ (self.u.T @ b), a - (a @ self.v) @ self.v.T))

    def beyond(self, part: Part) -> float:
        """‖X − UUᵀ·X·VVᵀ‖²: zero where X lies in both spaces."""
        if not len(self.values):
            return 0.0
        x = Part(None, part.whole) if part.pair is None else part
        if x.pair is None:
            whole = x.dense()
            inside = self.u @ (self.u.T @ whole @ self.v) @ self.v.T
            return float((whole - inside).square().sum())
        b, a = x.pair
        inside = self.u @ (self.u.T @ b)
        rest, past = b - inside, a - (a @ self.v) @ self.v.T
        first = ((rest.T @ rest) * (a @ a.T)).sum()
        return float(first + ((inside.T @ inside) * (past @ past.T)).sum())

    def wedderburn(self, parent: Space) -> tuple[float, float, int]:
        """(c, deviation, k) of a parent P in this T.

        Where T = c·P + M and the ranks of c·P and M add up, D = V_Pᵀ·T⁺·U_P·Σ_P = I/c, whatever M
        is (Wedderburn's rank reduction, 1934). c comes from the mean of the diagonal over the k
        strong directions of P; deviation: ‖D − I/c‖ over ‖I/c‖, about 1 or more for a stranger.
        """
        if not len(self.values) or not len(parent.values):
            return 0.0, float("inf"), 0
        k = int((parent.values >= STRONG * parent.values[0]).sum())
        root = parent.values[:k].sqrt()
        eye = torch.eye(k, dtype=root.dtype)
        best = 0.0, float("inf")
        for inverse in self._inverses(parent.u[:, :k], parent.v[:, :k]):
            d = root[:, None] * inverse * root
            mean = float(d.diagonal().mean())
            if mean == 0.0:
                continue
            deviation = float((d / mean - eye).norm()) / k**0.5
            if deviation < best[1]:
                best = 1 / mean, deviation
        return *best, k

    def _inverses(self, u: Tensor, v: Tensor) -> Iterator[Tensor]:
        """Vᵀ·T⁺·U, and the same freed of what rounding adds to BᵀB, to AAᵀ and to both.

        Parents that are nearly alike leave small singular values in T, which rounding lifts: T⁺
        comes out too small and c too large. Its expected share can be taken off (Fuller,
        Measurement Error Models, 1987, 2.2). A merge by concatenation may have kept A to the bit:
        hence each alone.
        """
        yield (v.T @ self.v) / self.values @ (self.u.T @ u)
        if self.stored is None:
            return
        (b, a), (b_noise, a_noise) = self.stored
        nothing = torch.zeros_like(b_noise)
        for b_less, a_less in ((b_noise, nothing), (nothing, a_noise), (b_noise, a_noise)):
            left, failed_left = torch.linalg.cholesky_ex(a @ a.T - torch.diag(a_less))
            right, failed_right = torch.linalg.cholesky_ex(b.T @ b - torch.diag(b_less))
            if failed_left or failed_right:
                continue
            yield torch.cholesky_solve(a @ v, left).T @ torch.cholesky_solve(b.T @ u, right)
