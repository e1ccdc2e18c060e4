"""Exact numbers of one module that two adapters have in common, in float64.

With ΔW = B·A on both sides, the QR factors of [B_x B_y] and [A_xᵀ A_yᵀ] turn X and Y together into
two small matrices X̂, Ŷ: X = Q·X̂·Pᵀ and Y = Q·Ŷ·Pᵀ with one Q and one P of orthonormal columns.
So ‖X − Y/c‖ = ‖X̂ − Ŷ/c‖ for every c, and inner products and singular values are the same. The
residual is formed before it is squared: through ‖X‖² − 2⟨X, Y⟩ + ‖Y‖² nothing below 1e-8 of ‖X‖
could be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafind.files.tensors import NAMES
from lorafind.formats.delta import ROUNDING, Delta, Kronecker, LowRank, Rounding

#: Random signs per estimate of ‖XYᵀ‖² where X and Y are dense (relative sd at most √(2/PROBES)).
PROBES = 32
#: Allowed squared residual in units of the expected squared rounding error (1.5² = 2.25), and the
#: most where a handful of numbers carry it all.
ALLOWED, MOST_ALLOWED = 2.25, 12.0
#: Rounding exceeds what is allowed for it with a probability below exp(−TAIL) per module.
TAIL = 14.0
#: Below this share of Σ_j ‖b_j‖²‖a_j‖² the product B·A is float64 noise about zero.
NOISE = 1e-26


@dataclass(frozen=True, slots=True)
class Match:
    """What is known of one common module m; X and Y are its two ΔW.

    numbers: o·n; xx, yy, xy: ‖X‖², ‖Y‖², ⟨X, Y⟩; chance: see :func:`chance`.
    x_rest = min over d of ‖X − d·Y‖² and y_rest = min over c of ‖Y − c·X‖², formed as residuals.
    x_rank, y_rank: bounds of the rank from the form; x_tail = Σ σ_i(X)² over i > y_rank (what
    the best approximation of Y's rank must lose), y_tail likewise.
    x_error, y_error: the expected squared rounding error T² at x_dtype, y_dtype; x_uneven,
    y_uneven: the sum of the squares of its independent terms.
    x_bits: every c for which rounding c·X to Y's dtype gives Y's stored numbers exactly; y_bits
    the other way round. Filled only where it can matter.
    """

    numbers: int
    xx: float
    yy: float
    xy: float
    chance: float
    x_rest: float
    y_rest: float
    x_rank: int
    y_rank: int
    x_tail: float
    y_tail: float
    x_error: float
    y_error: float
    x_uneven: float
    y_uneven: float
    x_dtype: str
    y_dtype: str
    x_bits: tuple[float, ...] = ()
    y_bits: tuple[float, ...] = ()

    def flipped(self) -> Match:
        """The same with X and Y exchanged."""
        names = ("x_rest", "x_rank", "x_tail", "x_error", "x_uneven", "x_dtype", "x_bits")
        swapped: dict[str, Any] = {"xx": self.yy, "yy": self.xx}
        for name in names:
            other = "y" + name[1:]
            swapped[name], swapped[other] = getattr(self, other), getattr(self, name)
        return replace(self, **swapped)

    def noise(self, c: float) -> float:
        """The largest ‖Y − c·X‖² that the rounding of both can explain.

        2.25 times the expectation c²·T_x² + T_y²: mantissas that all lie just above a power of two
        err by up to twice the average. Where few numbers carry the error, chance adds to that: with
        N = (Σ e)²/Σ e² equal terms out of the terms e, a χ² of N degrees stays below
        N + 2√(N·t) + 2t but for a probability of exp(−t) (Laurent and Massart 2000, lemma 1).
        """
        square = c * c
        expected = square * self.x_error + self.y_error
        if not expected:
            return 0.0
        t = TAIL * (square * square * self.x_uneven + self.y_uneven) / (expected * expected)
        return expected * min(max(ALLOWED, 1 + 2 * math.sqrt(t) + 2 * t), MOST_ALLOWED)

    def from_x(self, c: float) -> float:
        """‖Y − c·X‖², exact also where it is far below ‖Y‖²."""
        if not self.xx:
            return self.yy
        return self.y_rest + (c - self.xy / self.xx) ** 2 * self.xx

    def from_y(self, d: float) -> float:
        """‖X − d·Y‖², exact also where it is far below ‖X‖²."""
        if not self.yy:
            return self.xx
        return self.x_rest + (d - self.xy / self.yy) ** 2 * self.yy


@dataclass(frozen=True, slots=True)
class Overlap:
    """The inner products alone: ‖X‖², ‖Y‖², ⟨X, Y⟩ and :func:`chance`."""

    xx: float
    yy: float
    xy: float
    chance: float


def precision(delta: Delta, effective: str) -> str:
    """The coarser of the file's effective dtype and the dtypes that this module is stored in."""
    stored = [NAMES[t.dtype] for t in delta.tensors().values()]
    return max([effective, *stored], key=lambda name: ROUNDING[name].u)


def rank_bound(delta: Delta) -> int:
    """The largest rank that ΔW can have in its form, from shapes alone."""
    limit = min(delta.shape)
    if delta.family == "lora":
        return min(delta.rank, limit)
    if delta.family == "loha":
        return min(delta.rank**2, limit)
    return limit


class Sides:
    """Two modules of one shape as products of factors, as far as their forms allow.

    pairs: (B, A) of X and of Y (B o × r, A r × n); two Kronecker products of equal parts stand as
    vec(w1)·vec(w2)ᵀ, a rearrangement that keeps inner products (but not singular values), and
    their parts are kept. None where a form has no factors.
    """

    def __init__(self, x: Delta, y: Delta) -> None:
        self.x, self.y = x, y
        self.pairs: list[tuple[Tensor, Tensor]] | None = None
        self.parts: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        if isinstance(x, Kronecker) and isinstance(y, Kronecker):
            parts = (x.left() * x.scale, y.left() * y.scale, x.right(), y.right())
            if parts[0].shape == parts[1].shape and parts[2].shape == parts[3].shape:
                self.parts = parts
                self.pairs = [
                    (w1.reshape(-1, 1), w2.reshape(1, -1))
                    for w1, w2 in zip(parts[:2], parts[2:], strict=True)
                ]
                return
        first, second = x.factors(), y.factors()
        if first is not None and second is not None:
            self.pairs = [first, second]

    def cores(self) -> tuple[Tensor, Tensor]:
        """X̂ and Ŷ (p × q, float64; p, q ≤ r_x + r_y), X and Y themselves without factors."""
        if self.pairs is None:
            return self.x.dense(), self.y.dense()
        (b, a), (d, c) = self.pairs
        left = _triangle(torch.cat([b.T, d.T]).T)
        right = _triangle(torch.cat([a, c]).T)
        k = b.shape[1]
        return left[:, :k] @ right[:, :k].T, left[:, k:] @ right[:, k:].T

    def grams(self) -> list[tuple[Tensor, Tensor]]:
        """(BᵀB, A·Aᵀ) of both; empty without factors."""
        found = []
        for delta, (b, a) in zip((self.x, self.y), self.pairs or (), strict=False):
            known = delta.grams() if isinstance(delta, Kronecker) and not self.parts else None
            found.append(known or (b.T @ b, a @ a.T))
        return found

    def floors(self) -> list[float]:
        """Below these ‖X‖² and ‖Y‖² are noise about an exact zero."""
        if self.pairs is None:
            return [0.0, 0.0]
        return [NOISE * float(b.square().sum(0) @ a.square().sum(1)) for b, a in self.pairs]

    def crossed(self, x_hat: Tensor, y_hat: Tensor) -> tuple[float, float]:
        """‖X·Yᵀ‖² and ‖Xᵀ·Y‖² from the cores."""
        if self.parts is None:
            return _crossed(x_hat, y_hat)
        one, two = _crossed(*self.parts[:2]), _crossed(*self.parts[2:])
        return one[0] * two[0], one[1] * two[1]


def _triangle(tall: Tensor) -> Tensor:
    """R of the QR factorisation; a matrix that is not tall stays as it is."""
    if tall.shape[0] <= tall.shape[1]:
        return tall
    return torch.linalg.qr(tall, mode="r").R


def overlap(x: Delta, y: Delta) -> Overlap:
    """Inner products through the Grams of the factors: half of the work of :func:`measure`."""
    sides = Sides(x, y)
    if sides.pairs is None or sides.parts is not None:
        x_hat, y_hat = sides.cores()
        sums = _square(x_hat), _square(y_hat), float((x_hat * y_hat).sum())
        return Overlap(*sums, chance(x, *sides.crossed(x_hat, y_hat)))
    (b, a), (d, c) = sides.pairs
    (g, h), (k, q) = sides.grams()
    left, right = b.T @ d, a @ c.T
    xx, yy = (
        _or_zero(float((one * two).sum()), NOISE * float(one.diagonal() @ two.diagonal()))
        for one, two in ((g, h), (k, q))
    )
    outer = max(0.0, float(((g @ right) * (right @ k)).sum()))
    inner = max(0.0, float(((h @ left) * (left @ q)).sum()))
    xy = float((left * right).sum()) if xx and yy else 0.0
    return Overlap(xx, yy, xy, chance(x, outer, inner))


def chance(x: Delta, outer: float, inner: float) -> float:
    """Variance of ⟨X, Y⟩ if Y stood to X as a stranger that shares one of its factors.

    outer, inner: ‖X·Yᵀ‖² and ‖Xᵀ·Y‖². Null hypothesis: Y's output side has nothing to do with X,
    which is Y replaced by O·Y with O a random rotation of the o outputs. Then E⟨X, O·Y⟩² =
    ‖X·Yᵀ‖²/o, whatever the rows of the two have in common: it holds for one and the same A (one
    seed, or a frozen A) under two B. The mirror image, one B under two A, gives ‖Xᵀ·Y‖²/n; the
    larger of the two is taken. (For strangers in both sides the truth is smaller, about
    ‖X‖²‖Y‖²/(o·n).) A side of width 1 cannot be turned and has no say.
    """
    o, n = x.shape
    shares = [total / width for total, width in ((outer, o), (inner, n)) if width > 1]
    return max(shares, default=outer)


def _square(t: Tensor) -> float:
    return float(t.square().sum())


def _or_zero(size: float, floor: float) -> float:
    return size if size > floor else 0.0


def _crossed(a: Tensor, b: Tensor) -> tuple[float, float]:
    """‖A·Bᵀ‖² and ‖Aᵀ·B‖²; of large matrices an unbiased estimate through random signs."""
    if a.numel() * min(a.shape) <= 2**26:
        return _square(a @ b.T), _square(a.T @ b)
    generator = torch.Generator().manual_seed(0)
    found = []
    for one, two in ((a, b), (a.T, b.T)):
        signs = torch.randint(0, 2, (one.shape[0], PROBES), generator=generator)
        found.append(_square(one @ (two.T @ (signs.to(a.dtype) * 2 - 1))) / PROBES)
    return found[0], found[1]


def squared_norm(delta: Delta) -> float:
    """‖ΔW‖² in float64; exactly 0 where B·A cancels to nothing."""
    norm = delta.squared_norm()
    if not isinstance(delta, LowRank):
        return norm
    b, a = delta.factors()
    sizes = float(b.square().sum(0) @ a.square().sum(1))
    if norm <= 1e-9 * sizes:
        # So much cancels that the Grams no longer tell the number.
        norm = _square(_triangle(b) @ _triangle(a.T).T)
    return _or_zero(norm, NOISE * sizes)


def measure(x: Delta, y: Delta, x_dtype: str, y_dtype: str) -> Match:
    """Every number of :class:`Match` but the bits; x and y have one shape."""
    sides = Sides(x, y)
    x_hat, y_hat = sides.cores()
    floors = sides.floors()
    xx, yy = _or_zero(_square(x_hat), floors[0]), _or_zero(_square(y_hat), floors[1])
    xy = float((x_hat * y_hat).sum()) if xx and yy else 0.0
    x_rank, y_rank = rank_bound(x), rank_bound(y)
    x_parts, y_parts = (
        delta.rounding_parts(_computed(dtype, min(x.rank, y.rank)))
        for delta, dtype in ((x, x_dtype), (y, y_dtype))
    )
    return Match(
        numbers=x.shape[0] * x.shape[1],
        xx=xx,
        yy=yy,
        xy=xy,
        chance=chance(x, *sides.crossed(x_hat, y_hat)) if xy else 0.0,
        x_rest=_square(x_hat - y_hat * (xy / yy)) if xy else xx,
        y_rest=_square(y_hat - x_hat * (xy / xx)) if xy else yy,
        x_rank=x_rank,
        y_rank=y_rank,
        x_tail=_tail(x_hat, y_rank) if y_rank < x_rank else 0.0,
        y_tail=_tail(y_hat, x_rank) if x_rank < y_rank else 0.0,
        x_error=float(x_parts.sum()),
        y_error=float(y_parts.sum()),
        x_uneven=_square(x_parts),
        y_uneven=_square(y_parts),
        x_dtype=x_dtype,
        y_dtype=y_dtype,
    )


def _tail(core: Tensor, rank: int) -> float:
    """Σ σ_i² over i > rank: the least squared error of any matrix of that rank."""
    gram = core @ core.T if core.shape[0] <= core.shape[1] else core.T @ core
    squares = torch.linalg.eigvalsh(gram)
    return float(squares[: max(0, len(squares) - rank)].clamp(min=0).sum())


def _computed(dtype: str, rank: int) -> Rounding:
    """Rounding to ``dtype`` of what single precision has computed.

    A product with an r × r matrix, as in any change of factors, sums r terms in single precision:
    measured against B·G·G⁻¹·A that is an error of about √r roundings, for every condition of G.
    """
    stored, single = ROUNDING[dtype], ROUNDING["F32"]
    if stored.u < single.u:
        return stored
    return Rounding(
        math.hypot(stored.u, math.sqrt(rank) * single.u),
        math.hypot(stored.eta, math.sqrt(rank) * single.eta),
    )
