"""Exact inner products of two ΔW in float64, through the factors wherever there are any.

With X = B·A and Y = B'·A', ⟨X, Y⟩ = Σ (BᵀB') ∘ (A·A'ᵀ): work of (o + n)·r·r' instead of o·n. A ΔW
without factors meets another's factors as it stands, ⟨X, Y⟩ = Σ (BᵀY) ∘ A; Kronecker products meet
each other part by part. Only two forms without any structure are both made dense.
"""

from __future__ import annotations

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
        g = b.T @ b_y
        return float(((g @ (a_y @ a_y.T) @ g.T) * (a @ a.T)).sum())
    if first is not None or second is not None:
        (b, a), other = (first, y) if first is not None else (second, x)  # type: ignore[misc]
        t = b.T @ other.dense()
        return float(((t @ t.T) * (a @ a.T)).sum())
    one, two = x.dense(), y.dense()
    if one.shape[0] > one.shape[1]:
        return float((one.T @ two).square().sum())
    return float(((one @ one.T) * (two @ two.T)).sum())


def traceless_inner(x: Delta, y: Delta) -> float:
    """⟨K₀(X), K₀(Y)⟩ with K₀ = K − (tr K/o)·I and K = X·Xᵀ; tr K = ‖X‖²."""
    return gram_inner(x, y) - x.squared_norm() * y.squared_norm() / x.shape[0]


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
