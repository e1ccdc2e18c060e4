"""Orthogonal finetuning: W' = R·W or W·R, R made of blocks that a skew-symmetric Q stands for.

ΔW needs the base weight; what is compared is Q. Each parametrisation has a name of its own, for
none can be turned into another (Qiu et al. 2023, Liu et al. 2024 for the butterflies):

- ``oft``: ``oft_blocks`` [n, b, b] on the outputs, o = n·b, Q = B − Bᵀ, R = (I + Q)(I − Q)⁻¹
  (LyCORIS ``modules/diag_oft.py``, sd-scripts ``networks/oft.py``). Their alpha bounds ‖Q‖, in
  each program in another way, so that Q stands here unbounded and alpha beside it.
- ``boft``: the same of four dimensions [m, n, b, b] (LyCORIS ``modules/boft.py``).
- ``oft_rescale``, ``boft_rescale``: LyCORIS' ``rescale`` [o, 1, …] − 1, a factor per output.
- ``oft_diag``: ``oft_diag`` as it stands; programs differ in whether it is R or B.
- ``oft_r``: PEFT's and OneTrainer's ``oft_R.weight`` [n, b·(b − 1)/2] on the inputs: what stands
  above the diagonal of Q; divided by 2·√(b − 1) where OneTrainer says ``scaled_oft``.
- ``oft_r_blocks``: ``oft_r`` [n, b, b] of PEFT up to 0.13, Q = B − Bᵀ.
- ``boft_r``: PEFT's ``boft_R`` [m, n, b, b] on the inputs, Q = (B − Bᵀ)/2; ``boft_s``: its
  ``boft_s`` [o, 1] − 1, a factor per output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import (
    Form,
    Scale,
    Stored,
    Tensors,
    check_size,
    contradiction,
)
from lorafind.formats.families.others import vector

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """The Forms of all rotations of a module, and of the factors that go with them."""
    found = []
    if "oft_blocks" in tensors:
        wide = len(tensors["oft_blocks"].shape) == 4
        name = "boft" if wide else "oft"
        found.append(_blocks(tensors, "oft_blocks", name, name, outputs=True))
        if "rescale" in tensors:
            found.append(_factors(tensors, "rescale", name, f"{name}_rescale"))
    if "oft_diag" in tensors:
        found.append(_as_it_stands(tensors))
    if "oft_R" in tensors:
        found.append(_triangles(tensors))
    if "oft_r" in tensors:
        found.append(_blocks(tensors, "oft_r", "oft", "oft_r_blocks"))
    if "boft_R" in tensors:
        found.append(_blocks(tensors, "boft_R", "boft", "boft_r", scale=0.5))
        if "boft_s" in tensors:
            found.append(_factors(tensors, "boft_s", "boft", "boft_s"))
    return found


def _square(tensors: Tensors, role: str, dimensions: tuple[int, ...]) -> Stored:
    """A tensor of square blocks. Raises NotAnAdapter where it is none."""
    stored = tensors[role]
    shape = stored.shape
    if len(shape) not in dimensions or shape[-1] != shape[-2]:
        raise contradiction(tensors, f"{role} holds no square blocks")
    check_size(tensors, (math.prod(shape[:-1]), shape[-1]))
    return stored


def _blocks(
    tensors: Tensors,
    role: str,
    family: str,
    suffix: str,
    scale: float = 1.0,
    outputs: bool = False,
) -> Form:
    """Q of square blocks; outputs: on which side of the layer they act."""
    stored = _square(tensors, role, (4,) if suffix.startswith("boft") else (3,))
    key, b = stored.key, stored.shape[-1]

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Skew

        return Skew(fetch(key), scale)

    width = stored.shape[-3] * b
    # PEFT can share one block among all.
    width = 0 if stored.shape[-3] == 1 else width
    shape = (math.prod(stored.shape[:-1]), b)
    return _form(family, (role,), shape, bind, suffix, (width, 0) if outputs else (0, width))


def _triangles(tensors: Tensors) -> Form:
    stored = tensors["oft_R"]
    numbers = stored.shape[-1] if len(stored.shape) == 2 else 0
    b = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if b < 2 or b * (b - 1) // 2 != numbers:
        raise contradiction(tensors, "oft_R holds no triangles of square blocks")
    blocks, key = stored.shape[0], stored.key
    check_size(tensors, (blocks * b, b))
    flag = tensors["scaled_oft"].key if "scaled_oft" in tensors else None

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Skew

        # The flag is written only where it holds; an empty tensor says so too.
        scaled = flag is not None and bool(fetch(flag).bool().all())
        return Skew(fetch(key), 0.5 / math.sqrt(b - 1) if scaled else 1.0, b)

    layer = (0, blocks * b if blocks > 1 else 0)
    form = _form("oft", ("oft_R",), (blocks * b, b), bind, "oft_r", layer)
    return form._replace(beside=() if flag is None else ("scaled_oft",))


def _as_it_stands(tensors: Tensors) -> Form:
    stored = _square(tensors, "oft_diag", (3, 4))
    key, (*_, b) = stored.key, stored.shape
    shape = (math.prod(stored.shape[:-1]), b)

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Full

        return Full(fetch(key).reshape(shape))

    return _form("oft", ("oft_diag",), shape, bind, "oft_diag", (0, 0))


def _factors(tensors: Tensors, role: str, family: str, suffix: str) -> Form:
    """Factors per output, less 1."""
    form = vector(tensors, role, family, suffix, -1.0)
    return form._replace(layer=(form.shape[0], 0), fused="rows")


def _form(
    family: str,
    roles: tuple[str, ...],
    shape: tuple[int, int],
    bind: Callable[[Fetch], Delta],
    suffix: str,
    layer: tuple[int, int],
) -> Form:
    return Form(
        family,
        roles,
        shape,
        min(shape),
        0,
        1,
        bind,
        suffix=suffix,
        parameters=True,
        layer=layer,
        # A rotation of the inputs is that of every part of a fused layer.
        fused="same" if suffix in ("oft_r", "oft_r_blocks", "boft_r") else "whole",
    )
