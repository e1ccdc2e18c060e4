"""Proofs by bits: equal tensors, and casts that a rounding of the factors explains exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lorafind.files.tensors import DTYPES
from lorafind.formats.adapter import Adapter
from lorafind.formats.delta import F64, Delta

#: Dtypes through which tools pass on the way to a coarser one.
DETOURS = (None, torch.float16, torch.bfloat16)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """True where dtype, shape and every bit agree (NaN and signed zeros by their bits)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*flat)


def same_tensors(x: Adapter, y: Adapter) -> bool:
    """True where both files hold the same names, shapes, dtypes and bits, understood alike.

    Understood alike: metadata can name modules and set scales (PEFT's alpha, cloneofsimo's target
    list), so that equal tensors alone are not yet an equal adapter. The first difference ends it.
    """
    if x.plan.keys.keys() != y.plan.keys.keys() or x.plan.extras != y.plan.extras:
        return False
    ours, theirs = ({m.name: m.keys for m in p.plan.modules} for p in (x, y))
    if ours != theirs or not all(equal_bits(x.fetch(key), y.fetch(key)) for key in x.plan.keys):
        return False
    one, two = x.modules, y.modules
    return all(one[name].scale == two[name].scale for name in ours)


def explained(x: Delta, y: Delta, dtype: str, candidates: tuple[float, ...]) -> tuple[float, ...]:
    """Every c for which y's stored numbers are those of c·x rounded to ``dtype``, bit for bit.

    The forms must have the same tensors, in any spelling or shape. c is the ratio of the scales
    where the tensors were rounded as they are (1 where only alpha was rounded), else one of
    ``candidates``, with what is left of the scale folded into any one tensor, or √ of it into both
    of a pair.
    """
    ours, theirs = x.tensors(), y.tensors()
    if x.family != y.family or ours.keys() != theirs.keys() or not x.scale or not y.scale:
        return ()
    if any(ours[role].numel() != theirs[role].numel() for role in ours):
        return ()
    # The same numbers in Kronecker factors of other shapes are another product.
    if x.family == "lokr" and any(ours[role].shape != theirs[role].shape for role in ours):
        return ()
    if any(role.endswith("-1") for role in ours):
        # Of factors less 1, c times the factors is not c times the difference.
        candidates = ()
    target = DTYPES[dtype]
    found = []
    ratio = y.scale / x.scale
    plain = 1.0 if _rounded_scale(x, target) == y.scale else ratio
    wide = {role: t.reshape(-1).to(F64) for role, t in theirs.items()}
    if _rounds(ours, wide, target, dict.fromkeys(ours, 1.0)):
        found.append(plain)
    for c in candidates:
        if c not in found and any(
            _rounds(ours, wide, target, fold) for fold in _folds(tuple(ours), c / ratio)
        ):
            found.append(c)
    return tuple(found)


def _rounded_scale(x: Delta, dtype: torch.dtype) -> float:
    """Scale of x after its alpha (scale · divisor) was rounded with the rest."""
    alpha = torch.tensor(x.scale * x.divisor, dtype=F64).to(dtype)
    return float(alpha) / x.divisor


def _folds(roles: tuple[str, ...], total: float) -> Iterator[dict[str, float]]:
    """Ways of spreading a factor over the tensors of a module."""
    plain = dict.fromkeys(roles, 1.0)
    for role in roles:
        yield {**plain, role: total}
    if len(roles) == 2:
        root = math.sqrt(abs(total))
        yield {roles[0]: math.copysign(root, total), roles[1]: root}


def _rounds(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype, fold: dict[str, float]
) -> bool:
    """True where one chain of roundings leads from all of our tensors to theirs."""
    return any(
        all(_is_rounded(ours[role], theirs[role], dtype, fold[role], detour) for role in ours)
        for detour in DETOURS
        if detour is None or detour.itemsize > dtype.itemsize
    )


def _is_rounded(
    ours: Tensor, theirs: Tensor, dtype: torch.dtype, factor: float, detour: torch.dtype | None
) -> bool:
    for piece in (slice(0, 512), slice(512, None)):  # most differ early
        t = ours.reshape(-1)[piece]
        # Tools fold a scale in single precision.
        scaled = t if factor == 1.0 else t.to(torch.float32) * factor
        if detour is not None:
            scaled = scaled.to(detour)
        if not torch.equal(scaled.to(dtype).to(F64), theirs[piece]):
            return False
    return True
