"""(IA)³: W' = l ∘ W, a factor per input or per output (Liu et al. 2022).

LyCORIS (``modules/ia3.py``) stores ``weight`` = l − 1, [c] or for convolutions [1, c, 1, 1], and
``on_input``, 1 where c are the inputs; PEFT (``tuners/ia3``) stores ``ia3_l`` = l, [1, i] of the
inputs or [o, 1] of the outputs (whose bias it multiplies too), of a convolution [1, c, 1, 1] of
either, which the file does not tell. All are compared as l − 1.
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
    check_size,
    contradiction,
    is_number,
)
from lorafind.formats.families.others import vector

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """The Form of the factors, under ``ia3``; ``ia3_either`` where their side is not known."""
    if "ia3_l" in tensors:
        return [_peft(tensors)]
    if "ia3_weight" in tensors and "on_input" in tensors:
        return [_lycoris(tensors)]
    return []


def _peft(tensors: Tensors) -> Form:
    stored = tensors["ia3_l"]
    shape, key = stored.shape, stored.key
    if len([n for n in shape if n != 1]) > 1 or len(shape) < 2:
        raise contradiction(tensors, "ia3_l is no vector")
    count = math.prod(shape)
    check_size(tensors, (count, 2))
    if len(shape) > 2:
        return vector(tensors, "ia3_l", "ia3", "ia3_either", -1.0)
    inputs = shape[0] == 1

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Gain

        return Gain(fetch(key), inputs, -1.0)

    return _form(
        ("ia3_l",),
        count,
        bind,
        layer=(0, count) if inputs else (count, 0),
        fused="same" if inputs else "rows",
    )


def _lycoris(tensors: Tensors) -> Form:
    stored, flag = tensors["ia3_weight"], tensors["on_input"]
    if len([n for n in stored.shape if n != 1]) > 1 or not is_number(flag):
        raise contradiction(tensors, "weight is no vector, or on_input no number")
    count, key = math.prod(stored.shape), stored.key
    check_size(tensors, (count, 2))

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Gain

        return Gain(fetch(key), bool(fetch(flag.key).item()))

    form = _form(("ia3_weight",), count, bind, layer=(0, 0), fused="whole")
    return form._replace(beside=("on_input",))


def _form(
    roles: tuple[str, ...],
    count: int,
    bind: Callable[[Fetch], Delta],
    layer: tuple[int, int],
    fused: str,
) -> Form:
    return Form(
        "ia3",
        roles,
        (count, 2),
        1,
        0,
        1,
        bind,
        suffix="ia3",
        parameters=True,
        layer=layer,
        fused=fused,
    )
