"""What the families share: shapes to check, and the scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lorafind.files.outcome import NotAnAdapter
from lorafind.formats.adapter import Fetch

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


class Stored(NamedTuple):
    """A tensor of the file: its key, dtype (safetensors name) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


#: Role → tensor, of one module.
Tensors = Mapping[str, Stored]


class Form(NamedTuple):
    """A module's ΔW as one family writes it.

    roles: those used; shape: (o, n); dims: of the stored weight (4 for a convolution, 0 where the
    file does not tell); kernel: kh·kw; bind as in ModulePlan. suffix: appended to the canonical
    name with a dot where this is not the weight's ΔW but something beside it; parameters: True
    where the numbers are parameters (of a rotation, of a rescaling) and no ΔW, which would need the
    base weight: they are compared with the like only.
    """

    family: str
    roles: tuple[str, ...]
    shape: tuple[int, int]
    rank: int
    dims: int
    kernel: int
    bind: Callable[[Fetch], Delta]
    suffix: str = ""
    parameters: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """s of one module.

    alpha: the key of the stored alpha, which wins over what a PEFT configuration says: ``config``
    its alpha, ``rank`` its r, ``root`` its rsLoRA (α/√r). Without any 1.
    """

    alpha: str | None = None
    config: float | None = None
    rank: int | None = None
    root: bool = False

    def over(self, rank: int) -> Callable[[Fetch], float]:
        """A function that gives s for a rank. Stored alpha 0 means alpha = rank, as to trainers."""
        key = self.alpha
        if key is None:
            fixed = 1.0
            if self.config is not None:
                fixed = self.config / (math.sqrt(rank) if self.root else rank)
            return lambda fetch: fixed

        def stored(fetch: Fetch) -> float:
            alpha = float(fetch(key).item())
            return alpha / rank if alpha else 1.0

        return stored


def contradiction(tensors: Tensors, what: str) -> NotAnAdapter:
    """``invalid``: shapes of one module that cannot be multiplied."""
    first = next(iter(tensors.values()))
    shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in tensors.items())
    why = f"the shapes at {first.key} contradict each other: {what} ({shapes})"
    return NotAnAdapter("invalid", why)
