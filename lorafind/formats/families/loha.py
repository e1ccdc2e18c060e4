"""LoHa: ΔW = s·(w1a·w1b) ∘ (w2a·w2b) (LyCORIS ``modules/loha.py``).

Shapes: a [o, r], b [r, i·kh·kw]; Tucker: a [r, o], b [r, i], t [r, r, kh, kw].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import Form, Scale, Tensors, check_size, contradiction

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

HALVES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with all four halves, or None."""
    if not all(role in tensors for role in HALVES):
        return None
    present = [role in tensors for role in CORES]
    if any(present) != all(present):
        raise contradiction(tensors, "one of the two Tucker cores is missing")
    tucker = all(present)
    shapes = [
        _half(tensors, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}" if tucker else None)
        for i in (1, 2)
    ]
    if shapes[0] != shapes[1]:
        raise contradiction(tensors, "the two halves have different shapes")
    check_size(tensors, shapes[0])
    for role in CORES if tucker else ():
        check_size(tensors, (tensors[role].shape[0], shapes[0][1]))
    rank = tensors["hada_w1_b"].shape[0]
    s = scale.over(rank)
    keys = [tensors[role].key for role in HALVES]
    cores = [tensors[role].key for role in CORES] if tucker else []

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Hadamard

        w1_a, w1_b, w2_a, w2_b = map(fetch, keys)
        t1, t2 = map(fetch, cores) if cores else (None, None)
        return Hadamard(w1_a, w1_b, w2_a, w2_b, s(fetch), t1, t2)

    kernel = math.prod(tensors["hada_t1"].shape[2:]) if tucker else 1
    roles = (*HALVES, *CORES) if tucker else HALVES
    dims = 2 + len(tensors["hada_t1"].shape[2:]) if tucker else 0
    shape = shapes[0]
    return Form("loha", roles, shape, rank, dims, kernel, bind, scaled=True, layer=shape)


def _half(tensors: Tensors, a_role: str, b_role: str, core_role: str | None) -> tuple[int, int]:
    a, b = tensors[a_role].shape, tensors[b_role].shape
    if len(a) != 2 or len(b) < 2:
        raise contradiction(tensors, "a half is no matrix")
    if core_role is None:
        o, rank = a
        n = math.prod(b[1:])
    else:
        core = tensors[core_role].shape
        if len(core) < 3 or core[:2] != (a[0], b[0]) or len(b) != 2:
            raise contradiction(tensors, "a Tucker core does not fit its half")
        rank, o = core[1], a[1]
        n = b[1] * math.prod(core[2:])
    if rank != b[0] or not rank:
        raise contradiction(tensors, "a and b have different ranks")
    return o, n
