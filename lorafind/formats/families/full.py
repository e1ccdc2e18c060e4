"""Full differences: ``diff`` is ΔW itself; α is ignored (ComfyUI, LyCORIS ``modules/full.py``).

``diff_b``, ``b_norm``: of a bias; ``w_norm``: of a norm's weight; PEFT's ``lora_B.bias``: a bias
that is scaled as its module is; ``diff_m``: of Wan's modulation (ComfyUI-WanVideoWrapper).
``set_weight`` takes the place of the weight (ComfyUI), so that no ΔW is known without the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import Form, Scale, Stored, Tensors, check_size

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

#: Role → the suffix of the vector's canonical name.
VECTORS = {
    "diff_b": "bias",
    "b_norm": "bias",
    "up_bias": "bias",
    "w_norm": "weight",
    "diff_m": "modulation",
}


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with ``diff``, or None; of a norm where that is a vector."""
    stored = tensors.get("diff")
    if stored is None or not stored.shape:
        return None
    o, n = stored.shape[0], math.prod(stored.shape[1:])
    check_size(tensors, (o, n), dense=False)
    form = _form(stored, "diff", (o, n), None)
    return form._replace(suffix="weight") if form.dims == 1 else form


def find_all(tensors: Tensors, scale: Scale, rank: int | None) -> list[Form]:
    """The Forms of bias and norm differences, and of a weight to set; rank: of the module."""
    found: dict[str, Form] = {}
    for role, suffix in VECTORS.items():
        stored = tensors.get(role)
        if stored is None or suffix in found or not _is_vector(stored, role):
            continue
        o = math.prod(stored.shape)
        check_size(tensors, (o, 1), dense=False)
        s = scale.over(rank) if role == "up_bias" and rank else None
        found[suffix] = _form(stored, role, (o, 1), s)._replace(suffix=suffix)
    value = tensors.get("set_weight")
    if value is not None and value.shape:
        o, n = value.shape[0], math.prod(value.shape[1:])
        check_size(tensors, (o, n), dense=False)
        form = _form(value, "set_weight", (o, n), None, absolute=True)
        found["set_weight"] = form._replace(suffix="set_weight", parameters=True)
    return list(found.values())


def _is_vector(stored: Stored, role: str) -> bool:
    if role == "diff_m":  # [1, 6, width]
        return bool(stored.shape)
    return bool(stored.shape) and len([n for n in stored.shape if n != 1]) <= 1


def _form(
    stored: Stored,
    role: str,
    shape: tuple[int, int],
    s: Callable[[Fetch], float] | None,
    absolute: bool = False,
) -> Form:
    key = stored.key

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Full, Value

        kind = Value if absolute else Full
        return kind(fetch(key).reshape(shape), 1.0 if s is None else s(fetch))

    dims = len(stored.shape)
    kernel = math.prod(stored.shape[2:]) if shape[1] > 1 else 1
    return Form("full", (role,), shape, min(shape), dims, kernel, bind, layer=shape)
