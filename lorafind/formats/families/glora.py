"""GLoRA: W' = W + s·(W·A + B), A and B of low rank (Chavan et al. 2023; LyCORIS ``glora.py``).

New layout: a1 [i, r], a2 [r, i], b1 [o, r], b2 [r, i(, kh, kw)], A = a1·a2, B = b1·b2, for
convolutions with ``bm`` [r, r, kh, kw] in Tucker form. Old layout: a1 [r, i], a2 [i, r], b1 [r, i],
b2 [o, r], A = a2·a1, B = b2·b1. B is ΔW; A, i × i, needs the base weight and is compared as it
stands, under ``glora_a``. s = α/r, although with rsLoRA LyCORIS saves α itself and loses that.
"""

from __future__ import annotations

from lorafind.formats.families.common import Form, Scale, Tensors, contradiction
from lorafind.formats.families.lora import product

HALVES = ("a1", "a2", "b1", "b2")


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of B, which is ΔW, of a module with all four factors; or None."""
    if not all(role in tensors for role in HALVES):
        return None
    up, down = ("b2", "b1") if _is_old(tensors) else ("b1", "b2")
    form = product(tensors, scale, up, down, "bm")
    return form._replace(family="glora")


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """The Form of A."""
    if not all(role in tensors for role in HALVES):
        return []
    up, down = ("a2", "a1") if _is_old(tensors) else ("a1", "a2")
    form = product(tensors, scale, up, down, "")
    if form.shape[0] != form.shape[1]:
        raise contradiction(tensors, "A is not square")
    form = form._replace(family="glora", suffix="glora_a", parameters=True, fused="same")
    return [form._replace(layer=(0, form.shape[1]))]


def _is_old(tensors: Tensors) -> bool:
    """Of a square layer both layouts fit: then that with the lower rank, of equal ones the new."""
    shapes = [tensors[role].shape for role in HALVES]
    if any(len(shape) < 2 for shape in shapes):
        raise contradiction(tensors, "a factor is no matrix")
    a1, a2, b1, b2 = (shape[:2] for shape in shapes)
    new = a1[1] == a2[0] == b2[0] == b1[1] and a1[0] == a2[1] == b2[1]
    old = a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]
    if not new and not old:
        raise contradiction(tensors, "neither layout of GLoRA fits")
    return old and (not new or a1[0] < a1[1])
