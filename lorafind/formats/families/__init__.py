"""The families of adapters: how each writes ΔW, one module of this package each."""

from __future__ import annotations

from lorafind.formats.families import full, loha, lokr, lora
from lorafind.formats.families.common import Form, Scale, Tensors

#: In the order in which ComfyUI tries them.
FAMILIES = (lora, loha, lokr, full)


def find(tensors: Tensors, scale: Scale) -> Form | None:
    """The ΔW that the tensors of one module write, by role; None where no family is complete.

    Raises NotAnAdapter (``invalid``) where shapes contradict each other.
    """
    for family in FAMILIES:
        form = family.find(tensors, scale)
        if form is not None:
            return form
    return None


__all__ = ["FAMILIES", "Form", "Scale", "Tensors", "find"]
