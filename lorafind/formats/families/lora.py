"""LoRA and LoCon: ΔW = s·up·down, with ``mid`` in Tucker form (LyCORIS, kohya-ss/sd-scripts).

Shapes: up [o, r(, 1, 1)], down [r, i(, kh, kw)]; Tucker: down [r, i, 1, 1], mid [r, r, kh, kw].
PEFT's embedding LoRA stores the transposes: A [r, i], B [o, r], and ΔW = s·(B·A)ᵀ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import Form, Scale, Tensors, contradiction

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with ``up`` and ``down``, or None."""
    if "embedding_A" in tensors and "embedding_B" in tensors:
        return _embedding(tensors, scale)
    if "up" not in tensors or "down" not in tensors:
        return None
    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    if len(up.shape) < 2 or len(down.shape) < 2:
        raise contradiction(tensors, "a factor is no matrix")
    rank = down.shape[0]
    kernel = math.prod(down.shape[2:])
    if math.prod(up.shape[1:]) != rank and (mid is None or math.prod(up.shape[1:]) != mid.shape[0]):
        raise contradiction(tensors, "up and down have different ranks")
    if mid is not None:
        if len(mid.shape) < 3 or mid.shape[:2] != (up.shape[1], rank) or kernel != 1:
            raise contradiction(tensors, "mid does not stand between up and down")
        kernel = math.prod(mid.shape[2:])
    if not rank:
        raise contradiction(tensors, "the rank is 0")
    s = scale.over(rank)
    up_key, down_key, mid_key = up.key, down.key, mid.key if mid else None

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import LowRank

        core = fetch(mid_key) if mid_key is not None else None
        return LowRank(fetch(up_key), fetch(down_key), s(fetch), core)

    n = down.shape[1] * kernel
    roles = ("up", "down") if mid is None else ("up", "down", "mid")
    return Form("lora", roles, (up.shape[0], n), rank, len(down.shape), kernel, bind)


def _embedding(tensors: Tensors, scale: Scale) -> Form:
    a, b = tensors["embedding_A"], tensors["embedding_B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise contradiction(tensors, "A and B have different ranks")
    rank = a.shape[0]
    s = scale.over(rank)
    a_key, b_key = a.key, b.key

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import LowRank

        return LowRank(fetch(a_key).T, fetch(b_key).T, s(fetch))

    shape = (a.shape[1], b.shape[0])
    return Form("lora", ("embedding_A", "embedding_B"), shape, rank, 2, 1, bind)
