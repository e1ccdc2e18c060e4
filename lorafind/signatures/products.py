"""Exact inner products of two ΔW in float64, through the factors wherever there are any.

With X = B·A and Y = B'·A', ⟨X, Y⟩ = Σ (BᵀB') ∘ (A·A'ᵀ): work of (o + n)·r·r' instead of o·n. A ΔW
without factors meets another's factors as it stands, ⟨X, Y⟩ = Σ (BᵀY) ∘ A; Kronecker products meet
each other part by part. Only two forms without any structure are both made dense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafind.formats.delta import Delta, Kronecker

Factors = tuple[Tensor, Tensor]


def inner(x: Delta, y: Delta) -> float:
    """⟨X, Y⟩, the Frobenius inner product. Raises ValueError for two shapes."""
    _same_shape(x, y)
    if (parts := _parts(x, y)) is not None:
        w, v, w_y, v_y = parts
        return float((w * w_y).sum() * (v * v_y).sum())
    first, second = x.factors(), y.factors()
    if first is not None and second is not None:
        (b, a), (b_y, a_y) = first, second
        return float(((b.T @ b_y) * (a @ a_y.T)).sum())
    if first is not None:
        return _through(y, first)
    if second is not None:
        return _through(x, second)
    if isinstance(x, Kronecker):
        return _kronecker(x, y.dense())
    if isinstance(y, Kronecker):
        return _kronecker(y, x.dense())
    return float((x.dense() * y.dense()).sum())


def gram_inner(x: Delta, y: Delta) -> float:
    """⟨X·Xᵀ, Y·Yᵀ⟩ = ‖XᵀY‖², of the output-side Grams. Raises ValueError for two shapes."""
    _same_shape(x, y)
    if (parts := _parts(x, y)) is not None:
        w, v, w_y, v_y = parts
        return float((w.T @ w_y).square().sum() * (v.T @ v_y).square().sum())
    first, second = x.factors(), y.factors()
    if first is not None and second is not None:
        (b, a), (b_y, a_y) = first, second
        return _sandwich(b.T @ b_y, a @ a.T, a_y @ a_y.T)
    if first is not None or second is not None:
        (b, a), other = (first, y) if first is not None else (second, x)  # type: ignore[misc]
        t = b.T @ other.dense()
        return float(((t @ t.T) * (a @ a.T)).sum())
    one, two = x.dense(), y.dense()
    if one.shape[0] > one.shape[1]:
        return float((one.T @ two).square().sum())
    return float(((one @ one.T) * (two @ two.T)).sum())


@dataclass(frozen=True, slots=True)
class Products:
    """The inner products of two ΔW with themselves and each other.

    xx, yy, xy: ‖X‖², ‖Y‖², ⟨X, Y⟩; k_xx, k_yy, k_xy: the same of K₀ = K − (tr K/o)·I with K = X·Xᵀ,
    NaN where they were not asked for. x_size, y_size: Σ_j ‖b_j‖²‖a_j‖² of the factors (the squared
    norm itself without any); a squared norm far below is what cancellation has left.
    """

    xx: float
    yy: float
    xy: float
    x_size: float
    y_size: float
    k_xx: float = math.nan
    k_yy: float = math.nan
    k_xy: float = math.nan


def products(x: Delta, y: Delta, grams: bool = False) -> Products:
    """All products of two modules, with every Gram of the factors made once.

    grams: those of K₀ too. Raises ValueError for two shapes.
    """
    _same_shape(x, y)
    first, second = x.factors(), y.factors()
    o = x.shape[0]
    if first is None or second is None or _parts(x, y) is not None:
        xx, yy, xy = x.squared_norm(), y.squared_norm(), inner(x, y)
        found = Products(xx, yy, xy, xx, yy)
        if not grams:
            return found
        squares = gram_inner(x, x), gram_inner(y, y), gram_inner(x, y)
    else:
        (b, a), (b_y, a_y) = first, second
        g, g_y, g_xy = b.T @ b, b_y.T @ b_y, b.T @ b_y
        h, h_y, h_xy = a @ a.T, a_y @ a_y.T, a @ a_y.T
        xx, yy, xy = (float((one * two).sum()) for one, two in ((g, h), (g_y, h_y), (g_xy, h_xy)))
        sizes = (float(one.diagonal() @ two.diagonal()) for one, two in ((g, h), (g_y, h_y)))
        found = Products(max(0.0, xx), max(0.0, yy), xy, *sizes)
        if not grams:
            return found
        squares = _sandwich(g, h, h), _sandwich(g_y, h_y, h_y), _sandwich(g_xy, h, h_y)
    traces = xx * xx / o, yy * yy / o, xx * yy / o
    k_xx, k_yy, k_xy = (s - t for s, t in zip(squares, traces, strict=True))
    return replace(found, k_xx=k_xx, k_yy=k_yy, k_xy=k_xy)


def _sandwich(g: Tensor, h: Tensor, h_y: Tensor) -> float:
    """‖XᵀY‖² = Σ (G·H_y·Gᵀ) ∘ H with G = BᵀB', H = A·Aᵀ, H_y = A'·A'ᵀ."""
    return float(((g @ h_y @ g.T) * h).sum())


def _same_shape(x: Delta, y: Delta) -> None:
    if x.shape != y.shape:
        raise ValueError(f"two ΔW of shapes {x.shape} and {y.shape} have no inner product")


def _parts(x: Delta, y: Delta) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """(w1, w2) of x and of y, scales included, where both are cut in the same way; else None."""
    if not (isinstance(x, Kronecker) and isinstance(y, Kronecker)):
        return None
    parts = (x.left() * x.scale, x.right(), y.left() * y.scale, y.right())
    if parts[0].shape != parts[2].shape or parts[1].shape != parts[3].shape:
        return None
    return parts


def _through(x: Delta, factors: Factors) -> float:
    """⟨X, B·A⟩ = Σ (XᵀB)ᵀ ∘ A."""
    b, a = factors
    if isinstance(x, Kronecker):
        # (w1 ⊗ w2)ᵀ·B, one side after the other.
        w, v = x.left(), x.right()
        half = torch.einsum("ac,abr->cbr", w, b.reshape(w.shape[0], v.shape[0], -1))
        turned = torch.einsum("bd,cbr->rcd", v, half).reshape(a.shape)
        return x.scale * float((turned * a).sum())
    return float(((b.T @ x.dense()) * a).sum())


def _kronecker(x: Kronecker, y: Tensor) -> float:
    """⟨w1 ⊗ w2, Y⟩ without the Kronecker product."""
    w, v = x.left(), x.right()
    blocks = y.reshape(w.shape[0], v.shape[0], w.shape[1], v.shape[1])
    return x.scale * float((torch.einsum("ac,abcd->bd", w, blocks) * v).sum())
