"""Families of PEFT whose ΔW is beyond the file: their parameters, compared as they stand.

- ``fourierft`` (Gao et al. 2024): ``fourierft_spectrum`` [n], coefficients at places that a seed in
  the configuration chooses.
- ``hra`` (Yuan et al. 2024): ``hra_u`` [i·k², r], vectors of reflections of the inputs: needs W.
- ``randlora_lambda`` [r, n], ``randlora_gamma`` [n, min(o, i)] (Albert et al. 2025): diagonals
  about random bases that the file need not hold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorafind.formats.adapter import Fetch
from lorafind.formats.families.common import Form, Scale, Tensors, check_size, contradiction

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """The Forms of the parameters that a module has."""
    found = []
    if "fourierft_spectrum" in tensors:
        found.append(vector(tensors, "fourierft_spectrum", "fourierft", "fourierft"))
    if "hra_u" in tensors:
        form = matrix(tensors, "hra_u", "hra", "hra")
        found.append(form._replace(layer=(0, form.shape[0]), fused="same"))
    for role in ("randlora_lambda", "randlora_gamma"):
        if role in tensors:
            found.append(matrix(tensors, role, "randlora", role))
    return found


def vector(tensors: Tensors, role: str, family: str, suffix: str, offset: float = 0.0) -> Form:
    """A vector of parameters, n × 1; ``offset`` is added, so that what changes nothing is zero."""
    if len([n for n in tensors[role].shape if n != 1]) > 1:
        raise contradiction(tensors, f"{role} is no vector")
    return _form(tensors, role, family, suffix, (math.prod(tensors[role].shape), 1), offset)


def matrix(tensors: Tensors, role: str, family: str, suffix: str) -> Form:
    """A matrix of parameters."""
    if len(tensors[role].shape) != 2:
        raise contradiction(tensors, f"{role} is no matrix")
    first, second = tensors[role].shape
    return _form(tensors, role, family, suffix, (first, second))


def _form(
    tensors: Tensors,
    role: str,
    family: str,
    suffix: str,
    shape: tuple[int, int],
    offset: float = 0.0,
) -> Form:
    key = tensors[role].key
    check_size(tensors, shape)

    def bind(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Full

        return Full(fetch(key).reshape(shape), offset=offset)

    return Form(
        family,
        (role,),
        shape,
        min(shape),
        0,
        1,
        bind,
        suffix=suffix,
        parameters=True,
        fused="whole",
    )
