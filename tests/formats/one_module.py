"""One module of a file, understood without a file: what its keys say, and the ΔW of each Form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafind.files.tensors import NAMES
from lorafind.formats import configuration, families, keys
from lorafind.formats.delta import Delta
from lorafind.formats.families import Form, Scale
from lorafind.formats.families.common import Stored

STEM = "net.0.layer"


def roles_of(tensors: Mapping[str, Tensor], stem: str = STEM) -> dict[str, Stored]:
    """Role → tensor of the module ``stem``, and of what the file holds for all modules."""
    groups: dict[str, dict[str, Stored]] = {}
    for key, part in keys.split_all(tensors).items():
        stored = Stored(key, NAMES[tensors[key].dtype], tuple(tensors[key].shape))
        groups.setdefault(part.stem, {})[part.role] = stored
    families.share(groups)
    return groups[stem]


def forms_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, stem: str = STEM
) -> list[Form]:
    """The Forms of a module. config: PEFT's, which has the scale where the file has no alpha."""
    roles = roles_of(tensors, stem)
    alpha = roles["alpha"].key if "alpha" in roles else None
    scale = configuration.read({}, config).scale("", stem, alpha) if config else Scale(alpha)
    return families.find_all(roles, scale)


def deltas_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, stem: str = STEM
) -> dict[str, Delta]:
    """Suffix of the canonical name (empty: of ΔW) → what stands there."""
    found = {}
    for form in forms_of(tensors, config, stem):
        delta = form.bind(tensors.__getitem__)
        assert delta.shape == form.shape
        assert form.suffix not in found
        found[form.suffix] = delta
    return found


def module(parts: Mapping[str, Tensor], stem: str = STEM) -> dict[str, Tensor]:
    """Tensors by suffix as tensors by key."""
    return {f"{stem}.{suffix}": t for suffix, t in parts.items()}


def f64(t: Tensor) -> np.ndarray:
    """The stored numbers for a formula in numpy."""
    return np.asarray(t.detach().to(torch.float64).numpy())


def close(found: Delta | Tensor, expected: np.ndarray | Tensor, rtol: float = 1e-12) -> None:
    """Assert that a ΔW is a dense matrix, up to rounding in the norm of the whole."""
    one = found.dense() if isinstance(found, Delta) else found.detach().double()
    two = torch.as_tensor(expected).detach().double().reshape(one.shape)
    error = float((one - two).norm())
    assert error <= rtol * float(two.norm()) + 1e-300, (error, float(two.norm()))
