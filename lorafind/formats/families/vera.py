"""VeRA: ΔW = diag(b)·B·diag(d)·A, A and B random and common to all layers (PEFT ``tuners/vera``).

Kopiczko et al. 2024. Shapes: vera_lambda_b [o], vera_lambda_d [r]; vera_A [r, n'], vera_B [o', r],
once per file or not at all (they then come from a seed); a layer takes their first o rows and n
columns. So ΔW is known where the layer's n is, which the file does not say; without it, or without
A and B, the vectors are compared.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import (
    Form,
    Scale,
    Tensors,
    check_rank,
    check_size,
)
from lorafind.formats.families.others import vector

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

SHARED = ("vera_A", "vera_B")


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """The Forms of the two vectors, under ``vera_b`` and ``vera_d``."""
    found = []
    for role, suffix in (("vera_lambda_b", "vera_b"), ("vera_lambda_d", "vera_d")):
        if role in tensors:
            form = vector(tensors, role, "vera", suffix)
            layer = form.shape[0] if suffix == "vera_b" else 0
            found.append(form._replace(layer=(layer, 0)))
    return found


def find_in(tensors: Tensors, shape: tuple[int, int]) -> Form | None:
    """The Form of ΔW in a layer of a known shape; None where a tensor is missing or too small."""
    if not all(role in tensors for role in ("vera_lambda_b", "vera_lambda_d", *SHARED)):
        return None
    outer, inner, a, b = (
        tensors[role] for role in ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")
    )
    (o, n), rank = shape, math.prod(inner.shape)
    if len(a.shape) != 2 or len(b.shape) != 2 or math.prod(outer.shape) != o:
        return None
    if a.shape[0] < rank or b.shape[1] < rank or a.shape[1] < n or b.shape[0] < o:
        return None
    check_size(tensors, shape, dense=False)
    check_rank(tensors, rank, shape)
    keys = (b.key, inner.key, a.key, outer.key)

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Diagonal

        left, d, right, diagonal = map(fetch, keys)
        return Diagonal(left[:o, :rank], d, right[:rank, :n], outer=diagonal)

    roles = ("vera_lambda_b", "vera_lambda_d", *SHARED)
    return Form("vera", roles, shape, rank, 2, 1, bind, layer=shape, fused="whole")
