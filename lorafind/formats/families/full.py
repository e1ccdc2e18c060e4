"""Full differences: ``diff`` is ΔW itself; α is ignored (ComfyUI, LyCORIS ``modules/full.py``).

``diff_b``, ``b_norm``: of a bias; ``w_norm``: of a norm's weight; PEFT's ``lora_B.bias``: a bias
that is scaled as its module is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import Form, Scale, Stored, Tensors

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

#: Role → the suffix of the vector module's canonical name, and the kind of layer that it changes.
VECTORS = {
    "diff_b": ("bias", "bias"),
    "b_norm": ("bias", "bias"),
    "up_bias": ("bias", "bias"),
    "w_norm": ("weight", "norm"),
}


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with ``diff``, or None."""
    if "diff" not in tensors or not tensors["diff"].shape:
        return None
    return _form(tensors["diff"], ("diff",), None)


def find_vector(tensors: Tensors, role: str, scale: Scale, rank: int | None) -> Form | None:
    """The Form of a bias or norm difference; ``rank``: of the module beside it."""
    stored = tensors[role]
    if len([n for n in stored.shape if n != 1]) > 1 or not stored.shape:
        return None
    return _form(stored, (role,), scale.over(rank) if role == "up_bias" and rank else None)


def _form(stored: Stored, roles: tuple[str, ...], s: Callable[[Fetch], float] | None) -> Form:
    key = stored.key
    o, n = stored.shape[0], math.prod(stored.shape[1:])

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Full

        return Full(fetch(key), 1.0 if s is None else s(fetch))

    dims = len(stored.shape)
    return Form("full", roles, (o, n), min(o, n), dims, math.prod(stored.shape[2:]), bind)
