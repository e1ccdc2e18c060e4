"""AdaLoRA: ΔW = s·B·diag(E)·A with s = α/(r + 10⁻⁵) (Zhang et al. 2023; PEFT ``tuners/adalora``).

Shapes: lora_A [r, i], lora_B [o, r], lora_E [r, 1]. r is ``ranknum`` where the file has it (PEFT no
longer saves it), else the rank of the factors. α, undivided in PEFT's ``scaling``, stands in its
configuration alone; without one s = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import (
    Form,
    Scale,
    Tensors,
    check_rank,
    check_size,
    contradiction,
    is_number,
)

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta

#: What PEFT adds to the rank.
EPSILON = 1e-5


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The Form of a module with ``lora_E`` between its factors, or None."""
    if not all(role in tensors for role in ("up", "down", "lora_E")):
        return None
    up, down, inner = tensors["up"], tensors["down"], tensors["lora_E"]
    ranks = tensors.get("ranknum")
    if len(up.shape) != 2 or len(down.shape) != 2 or up.shape[1] != down.shape[0]:
        raise contradiction(tensors, "up and down have different ranks")
    rank = down.shape[0]
    if math.prod(inner.shape) != rank or (ranks is not None and not is_number(ranks)):
        raise contradiction(tensors, "E is not one number per rank")
    shape = (up.shape[0], down.shape[1])
    check_size(tensors, shape, dense=False)
    check_rank(tensors, rank, shape)
    keys = (up.key, inner.key, down.key)
    s = _scale(scale, ranks.key if ranks is not None else None, rank)

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Diagonal

        b, e, a = map(fetch, keys)
        return Diagonal(b, e, a, s(fetch))

    return Form(
        "adalora",
        ("up", "down", "lora_E"),
        shape,
        rank,
        2,
        1,
        bind,
        scaled=True,
        beside=() if ranks is None else ("ranknum",),
        layer=shape,
    )


def _scale(scale: Scale, ranknum: str | None, rank: int) -> Callable[[Fetch], float]:
    if scale.fixed is not None:
        return scale.over(rank)

    def s(fetch: Fetch) -> float:
        alpha = scale.config
        if scale.alpha is not None:
            alpha = float(fetch(scale.alpha).item()) or float(rank)
        if alpha is None:
            return 1.0
        count = rank if ranknum is None else float(fetch(ranknum).item())
        return alpha / (count + EPSILON)

    return s
