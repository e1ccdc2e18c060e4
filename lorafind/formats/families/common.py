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

#: Numbers of a ΔW above which there is no such layer (the largest embeddings have 2³⁰).
LARGEST = 2**32
#: The same for a ΔW that may have to be made in memory (4 GiB in float64; the largest linear
#: layer of a transformer, Flux.2's, has 3.4·10⁸).
LARGEST_DENSE = 2**29

#: Rank above which it may not exceed the layer's: work on factors takes r² numbers.
LARGEST_RANK = 4096


class Stored(NamedTuple):
    """A tensor of the file: its key, dtype (safetensors name) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


#: Role → tensor, of one module.
Tensors = Mapping[str, Stored]


class Form(NamedTuple):
    """A change of a module as one family writes it.

    roles: the floating-point tensors that it is made of; shape: (o, n); dims: of the stored weight
    (4 for a convolution, 0 where the file does not tell); kernel: kh·kw; bind as in ModulePlan.
    suffix: appended to the canonical name with a dot where this is not the weight's ΔW but
    something beside it; parameters: True where the numbers are parameters (of a rotation, of a
    rescaling) and no ΔW, which would need the base weight: they are compared with the like only.
    scaled: True where the stored alpha multiplies it. beside: further roles that it reads, which
    hold no weights (indices, sizes, flags) and may be integers or booleans. layer: (o, n) of the
    layer that it changes, 0 where the file does not tell; of parameters ``shape`` says nothing
    about the layer. fused: what becomes of it where the layer is fused of several: ``rows`` is cut
    as ΔW is, ``same`` belongs to each part as it stands (it acts on the common input), ``whole``
    cannot be divided.
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
    scaled: bool = False
    beside: tuple[str, ...] = ()
    layer: tuple[int, int] = (0, 0)
    fused: str = "rows"


@dataclass(frozen=True, slots=True)
class Scale:
    """s of one module.

    alpha: the key of the stored alpha, which wins over what a PEFT configuration says: ``config``
    its alpha, ``rank`` its r, ``root`` its rsLoRA (α/√r). Without any 1. fixed: the key of a stored
    scale, which wins over all (webui's ``<module>.scale``).
    """

    alpha: str | None = None
    config: float | None = None
    rank: int | None = None
    root: bool = False
    fixed: str | None = None

    def over(self, rank: int) -> Callable[[Fetch], float]:
        """A function that gives s for a rank. Stored alpha 0 means alpha = rank, as to trainers."""
        fixed, key = self.fixed, self.alpha
        if fixed is not None:
            return lambda fetch: float(fetch(fixed).item())
        if key is None:
            s = 1.0
            if self.config is not None:
                s = self.config / (math.sqrt(rank) if self.root else rank)
            return lambda fetch: s

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


def check_size(tensors: Tensors, shape: tuple[int, int], dense: bool = True) -> None:
    """Raise NotAnAdapter where a ΔW of this shape is empty or larger than any layer.

    dense: it may have to be made as a whole, which takes as much memory as its shape says,
    however small the file.
    """
    o, n = shape
    if not o or not n:
        raise contradiction(tensors, f"a ΔW of {o} × {n} has no numbers")
    if o * n > (LARGEST_DENSE if dense else LARGEST):
        raise larger(tensors, shape)


def larger(tensors: Tensors, shape: tuple[int, int]) -> NotAnAdapter:
    """``unsupported``: a ΔW, or a part of it, that is larger than any layer."""
    o, n = shape
    key = next(iter(tensors.values())).key
    why = f"at {key} a ΔW of {o} × {n} is larger than the layers of known models"
    return NotAnAdapter("unsupported", why)


def check_rank(tensors: Tensors, rank: int, shape: tuple[int, int]) -> None:
    """Raise NotAnAdapter for a rank of 0, or one far beyond what the layer can have."""
    if not rank:
        raise contradiction(tensors, "the rank is 0")
    if rank > max(LARGEST_RANK, *shape):
        raise contradiction(tensors, f"rank {rank} for a ΔW of {shape[0]} × {shape[1]}")


def is_number(stored: Stored) -> bool:
    """True for a tensor of one number."""
    return all(n == 1 for n in stored.shape)
