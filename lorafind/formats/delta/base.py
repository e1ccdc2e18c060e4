"""What every form of ΔW can do, and the error of stored numbers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

F64 = torch.float64
#: Rows of a product that are looked at together where all of it would be too much.
BLOCK = 1024


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
    #: name of the family: ``lora``, ``loha``, ``lokr``, ``full``, …
    family: str

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Shape (o, n) of ΔW."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank as the file states it (LoHa: of one factor); ``full``: min(o, n)."""

    @property
    def divisor(self) -> int:
        """The rank by which alpha was divided: alpha is scale · divisor, where the file has one."""
        return self.rank

    @abstractmethod
    def dense(self, dtype: torch.dtype = F64) -> Tensor:
        """ΔW as an o × n matrix, scale included."""

    def rows(self, start: int, stop: int) -> Delta:
        """Rows ``start`` to ``stop`` (exclusive) of ΔW: one layer of several that are fused.

        Looks into the same stored tensors. Raises ValueError for rows that are not there.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of a ΔW of {self.shape[0]} rows")
        return self if (start, stop) == (0, self.shape[0]) else self._rows(start, stop)

    @abstractmethod
    def _rows(self, start: int, stop: int) -> Delta:
        """:meth:`rows`, of a part that is really smaller."""

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
        if (b[strongest] @ a).any():
            return False
        return not any(bool((part @ a).any()) for part in b.split(BLOCK))

    def is_finite(self) -> bool:
        """True when no stored number nor the scale is NaN or infinite."""
        return math.isfinite(self.scale) and all(
            bool(torch.isfinite(wide(t, torch.float32)).all()) for t in self.tensors().values()
        )

    def squared_norm(self) -> float:
        """‖ΔW‖² in float64 (Frobenius)."""
        pair = self.factors()
        if pair is None:
            return float(self.dense().square().sum())
        b, a = pair
        return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of a stored tensor in a dtype to compute with."""
    return t.to(dtype)


def flat(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as a matrix: rows × the rest."""
    return t.to(dtype).reshape(t.shape[0], -1)
