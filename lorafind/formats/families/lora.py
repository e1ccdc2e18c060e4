"""LoRA and LoCon: ΔW = s·up·down, with ``mid`` in Tucker form (LyCORIS, kohya-ss/sd-scripts).

Shapes: up [o, r(, 1, 1)], down [r, i(, kh, kw)]; Tucker: down [r, i, 1, 1], mid [r, r, kh, kw].
DyLoRA, LoRA-FA and concept sliders are saved in the same way.
PEFT's embedding LoRA stores the transposes: A [r, i], B [o, r], and ΔW = s·(B·A)ᵀ.
What LyCORIS extracts with ``--use_sparse_bias`` has single numbers beside it, added before the
scale: bias_indices [2, k], bias_values [k], bias_size [2] (LyCORIS ``utils/__init__.py``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.files.outcome import NotAnAdapter
from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import (
    Form,
    Scale,
    Tensors,
    check_rank,
    check_size,
    contradiction,
)

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

SPARSE = ("bias_indices", "bias_values", "bias_size")


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with ``up`` and ``down``, or None."""
    if "embedding_A" in tensors and "embedding_B" in tensors:
        return _embedding(tensors, scale)
    if "up" not in tensors or "down" not in tensors:
        return None
    form = product(tensors, scale, "up", "down", "mid")
    if any(role in tensors for role in SPARSE):
        return _with_residual(tensors, form)
    return form


def product(tensors: Tensors, scale: Scale, up_role: str, down_role: str, mid_role: str) -> Form:
    """The Form of a product of two factors, under any names."""
    up, down, mid = tensors[up_role], tensors[down_role], tensors.get(mid_role)
    if len(up.shape) < 2 or len(down.shape) < 2:
        raise contradiction(tensors, "a factor is no matrix")
    rank = down.shape[0]
    kernel = math.prod(down.shape[2:])
    inner = math.prod(up.shape[1:])
    if mid is None:
        if inner != rank:
            raise contradiction(tensors, "up and down have different ranks")
    else:
        if len(mid.shape) < 3 or mid.shape[:2] != (inner, rank) or kernel != 1:
            raise contradiction(tensors, "mid does not stand between up and down")
        kernel = math.prod(mid.shape[2:])
    shape = (up.shape[0], down.shape[1] * kernel)
    check_rank(tensors, rank, shape)
    check_size(tensors, shape, dense=False)
    if mid is not None:
        check_rank(tensors, inner, shape)
        check_size(tensors, (inner, shape[1]))
    s = scale.over(rank)
    up_key, down_key, mid_key = up.key, down.key, mid.key if mid else None

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import LowRank

        core = fetch(mid_key) if mid_key is not None else None
        return LowRank(fetch(up_key), fetch(down_key), s(fetch), core)

    roles = (up_role, down_role) if mid is None else (up_role, down_role, mid_role)
    dims = len(down.shape)
    return Form("lora", roles, shape, rank, dims, kernel, bind, scaled=True, layer=shape)


def _with_residual(tensors: Tensors, form: Form) -> Form:
    """ΔW = s·(up·down + E) with the few numbers of E."""
    if not all(role in tensors for role in SPARSE):
        raise contradiction(tensors, "a part of the sparse residual is missing")
    indices, values, size = (tensors[role] for role in SPARSE)
    if indices.shape != (2, *values.shape) or len(values.shape) != 1 or size.shape != (2,):
        raise contradiction(tensors, "the sparse residual is not two indices per number")
    if indices.dtype[:1] not in ("I", "U") or size.dtype[:1] not in ("I", "U"):
        raise contradiction(tensors, f"indices are stored as {indices.dtype}")
    check_size(tensors, form.shape)
    o, n = form.shape
    first, inner = tensors["up"].key, form.bind

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import LowRank, Residual

        low = inner(fetch)
        assert isinstance(low, LowRank)
        where = fetch(indices.key)
        rows, columns = where.long()
        inside = (rows >= 0) & (rows < o) & (columns >= 0) & (columns < n)
        if fetch(size.key).tolist() != [o, n] or not bool(inside.all()):
            raise NotAnAdapter("invalid", f"the sparse residual at {first} is not of its shape")
        return Residual(low, where, fetch(values.key))

    roles = (*form.roles, "bias_values")
    return form._replace(bind=bind, roles=roles, beside=("bias_indices", "bias_size"))


def _embedding(tensors: Tensors, scale: Scale) -> Form:
    a, b = tensors["embedding_A"], tensors["embedding_B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise contradiction(tensors, "A and B have different ranks")
    rank = a.shape[0]
    a_key, b_key = a.key, b.key
    shape = (a.shape[1], b.shape[0])
    check_rank(tensors, rank, shape)
    s = scale.over(rank)
    check_size(tensors, shape, dense=False)

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import LowRank

        return LowRank(fetch(a_key).T, fetch(b_key).T, s(fetch))

    roles = ("embedding_A", "embedding_B")
    return Form("lora", roles, shape, rank, 2, 1, bind, scaled=True, layer=shape)
