"""Merges as the usual tools make them, written independently of the product: dense, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorafind.formats.delta import Delta, LowRank

Modules = dict[str, Delta]
Weights = Sequence[float] | Mapping[str, Sequence[float]]


def low(delta: Delta) -> LowRank:
    assert isinstance(delta, LowRank)
    return delta


def weights_of(weights: Weights, name: str) -> Sequence[float]:
    return weights[name] if isinstance(weights, Mapping) else weights


def dense_sum(parents: Sequence[Modules], weights: Weights, name: str) -> Tensor:
    """Σ w_k·ΔW_k of one module."""
    parts = [
        w * p[name].dense()
        for w, p in zip(weights_of(weights, name), parents, strict=True)
        if name in p
    ]
    return torch.stack(parts).sum(0)


def concatenated(parents: Sequence[Modules], weights: Weights, dtype: torch.dtype) -> Modules:
    """[w₁B₁ w₂B₂ …]·[A₁; A₂; …]."""
    made: Modules = {}
    for name in {n: None for p in parents for n in p}:
        own = weights_of(weights, name)
        ups, downs = [], []
        for w, p in zip(own, parents, strict=True):
            if name in p:
                d = low(p[name])
                ups.append(d.up.double() * w * d.scale)
                downs.append(d.down.double())
        made[name] = LowRank(torch.cat(ups, 1).to(dtype), torch.cat(downs).to(dtype), 1.0)
    return made


def resized(parents: Sequence[Modules], weights: Weights, rank: int, dtype: torch.dtype) -> Modules:
    """The best approximation of rank ``rank`` of the sum, singular values shared out evenly."""
    made: Modules = {}
    for name in {n: None for p in parents for n in p}:
        u, s, vt = torch.linalg.svd(dense_sum(parents, weights, name), full_matrices=False)
        r = min(rank, len(s))
        root = s[:r].sqrt()
        made[name] = LowRank((u[:, :r] * root).to(dtype), (root[:, None] * vt[:r]).to(dtype), 1.0)
    return made


def factor_summed(
    parents: Sequence[Modules], ratios: Sequence[float], dtype: torch.dtype
) -> Modules:
    """As kohya's merge_lora.py: ratio·√(alpha / base alpha) in both factors, |·| in the up one."""
    made: Modules = {}
    for name in parents[0]:
        first = low(parents[0][name])
        rank = first.down.shape[0]
        base = first.scale * rank
        up, down = torch.zeros_like(first.up.double()), torch.zeros_like(first.down.double())
        for ratio, p in zip(ratios, parents, strict=True):
            d = low(p[name])
            scale = math.sqrt(d.scale * rank / base) * ratio
            up += abs(scale) * d.up.double()
            down += scale * d.down.double()
        made[name] = LowRank(up.to(dtype), down.to(dtype), base / rank)
    return made
