"""LoKr: ΔW = s·w1 ⊗ w2, each whole or factored (LyCORIS ``modules/lokr.py``).

Shapes: w1 [a, c]; w2 [b, d(, kh, kw)]; w2_b [r, d·kh·kw]; Tucker: w2_a [r, b], w2_b [r, d],
t2 [r, r, kh, kw]. s = α/r with r = w2_b.shape[0], else w1_b.shape[0]; 1 where both are whole
(LyCORIS then forces α = r when it trains, so that the stored α says nothing), except that PEFT,
which stores no α, multiplies by α/r of its configuration.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import (
    Form,
    Scale,
    Stored,
    Tensors,
    check_size,
    contradiction,
    larger,
)

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

ROLES = {
    "lokr_w1": "w1",
    "lokr_w1_a": "w1_a",
    "lokr_w1_b": "w1_b",
    "lokr_w2": "w2",
    "lokr_w2_a": "w2_a",
    "lokr_w2_b": "w2_b",
    "lokr_t2": "t2",
}
#: Numbers of a w2 that is made with t2, of a convolution: 1280 × 2560 × 3 × 3 is the largest known.
LARGEST_TUCKER = 2**25


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with w1 and w2, or None."""
    parts = {field: tensors[role] for role, field in ROLES.items() if role in tensors}
    if not (_has(parts, "w1") and _has(parts, "w2")):
        return None
    if "w1" in parts:
        parts.pop("w1_a", None), parts.pop("w1_b", None)
    if "w2" in parts:
        parts.pop("w2_a", None), parts.pop("w2_b", None), parts.pop("t2", None)
    if any(len(part.shape) < 2 for part in parts.values()):
        raise contradiction(tensors, "a factor is no matrix")
    (a, c), (b, d), kernel = _left(parts, tensors), _right(parts, tensors), 1
    core = parts.get("w2") or parts.get("t2")
    if core is not None:
        kernel = math.prod(core.shape[2:])
    shape = (a * b, c * d)
    check_size(tensors, shape)
    if "t2" in parts and b * d > LARGEST_TUCKER:
        raise larger(tensors, (b, d))
    factored = parts.get("w2_b") or parts.get("w1_b")
    rank = factored.shape[0] if factored else min(shape)
    if not rank:
        raise contradiction(tensors, "the rank is 0")
    if factored:
        s = scale.over(rank)
    elif scale.alpha is None and scale.config is not None and scale.rank:
        s = scale.over(scale.rank)
    else:
        s = Scale(fixed=scale.fixed).over(rank)
    keys = [parts[field].key if field in parts else None for field in ROLES.values()]

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Kronecker

        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (None if key is None else fetch(key) for key in keys)
        return Kronecker(w1, w1_a, w1_b, w2, w2_a, w2_b, t2, s(fetch))

    roles = tuple(role for role, field in ROLES.items() if field in parts)
    dims = len(core.shape) if core is not None else 0
    scaled = factored is not None
    return Form("lokr", roles, shape, rank, dims, kernel, bind, scaled=scaled, layer=shape)


def _has(parts: dict[str, Stored], name: str) -> bool:
    return name in parts or (f"{name}_a" in parts and f"{name}_b" in parts)


def _left(parts: dict[str, Stored], tensors: Tensors) -> tuple[int, int]:
    if "w1" in parts:
        return parts["w1"].shape[0], math.prod(parts["w1"].shape[1:])
    one, two = parts["w1_a"].shape, parts["w1_b"].shape
    if one[1:] != two[:1] or len(two) != 2:
        raise contradiction(tensors, "w1_a and w1_b have different ranks")
    return one[0], two[1]


def _right(parts: dict[str, Stored], tensors: Tensors) -> tuple[int, int]:
    if "w2" in parts:
        return parts["w2"].shape[0], math.prod(parts["w2"].shape[1:])
    one, two = parts["w2_a"].shape, parts["w2_b"].shape
    if "t2" not in parts:
        if one[1:] != two[:1]:
            raise contradiction(tensors, "w2_a and w2_b have different ranks")
        return one[0], math.prod(two[1:])
    core = parts["t2"].shape
    if len(core) < 3 or core[:2] != (one[0], two[0]) or len(one) != 2 or len(two) != 2:
        raise contradiction(tensors, "t2 does not stand between w2_a and w2_b")
    return one[1], two[1] * math.prod(core[2:])
