"""The families of adapters: how each writes ΔW, one module of this package each."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import replace

from lorafind.formats.families import (
    adalora,
    full,
    glora,
    ia3,
    loha,
    lokr,
    lora,
    oft,
    others,
    vera,
)
from lorafind.formats.families.common import (
    Form,
    Scale,
    Stored,
    Tensors,
    contradiction,
    is_number,
)

#: Those of which a module has one, as ComfyUI tries them; what only adds to another comes before.
FAMILIES = (adalora, lora, loha, lokr, glora, full)
#: Those that can stand beside.
PARAMETERS = (glora, ia3, oft, vera, others)
#: Roles of tensors that a file holds once for all modules.
SHARED = (*vera.SHARED, "randlora_A", "randlora_B")

#: Role → how an extra of it is called: tensors that act on the picture but are compared as they
#: stand, bit for bit up to rounding.
EXTRAS = {
    "magnitude": "dora_scale",
    "set_weight": "set_weight",
    "reshape_weight": "reshape_weight",
    "initial_norm": "initial_norm",
    "dora_multiplier": "dora_multiplier",
    "rescale": "rescale",
} | {role: role for role in SHARED}


def find_all(tensors: Tensors, scale: Scale) -> list[Form]:
    """All that the tensors of one module say, by role: at most one ΔW, and what stands beside it.

    Empty where no family is complete. Raises NotAnAdapter, ``invalid`` where shapes contradict each
    other, ``unsupported`` where they are larger than any layer.
    """
    alpha, fixed = tensors.get("alpha"), tensors.get("scale")
    for stored in (alpha, fixed):
        if stored is not None and (not is_number(stored) or stored.dtype[:1] == "C"):
            raise contradiction(tensors, f"{stored.key} is no single number")
    if fixed is not None:
        scale = replace(scale, fixed=fixed.key)
    main = _main(tensors, scale)
    found = [] if main is None else [main]
    for family in PARAMETERS:
        found += family.find_all(tensors, scale)
    rank = main.rank if main is not None else None
    taken = {form.suffix for form in found}
    found += [f for f in full.find_all(tensors, scale, rank) if f.suffix not in taken]
    if fixed is not None:
        found = [f._replace(beside=(*f.beside, "scale")) if f.scaled else f for f in found]
    return found


def _main(tensors: Tensors, scale: Scale) -> Form | None:
    for family in FAMILIES:
        form = family.find(tensors, scale)
        if form is not None:
            return form
    return None


def find_in(tensors: Tensors, shape: tuple[int, int]) -> Form | None:
    """The ΔW of a module of which :func:`find_all` knows only parameters, now that the layer's
    shape (o, n) is known; None where that does not suffice. It stands for all of its Forms.
    """
    return vera.find_in(tensors, shape)


def extras(tensors: Tensors, forms: Iterable[Form]) -> dict[str, str]:
    """What acts beside the ``forms`` of a module: suffix of its name → role.

    DoRA's magnitudes, weights that are set, the bound of a rotation.
    """
    roles = {role for form in forms for role in form.roles}
    found = {
        name: role
        for role, name in EXTRAS.items()
        if role in tensors and (role not in roles or role == "set_weight")
    }
    if "alpha" in tensors and roles & {"oft_blocks", "oft_diag"}:
        found["oft_alpha"] = "alpha"
    return found


def share(groups: MutableMapping[str, dict[str, Stored]]) -> None:
    """Give every module the tensors that its family keeps once for all (``base_model.vera_A``).

    groups: stem → roles of all modules of a file.
    """
    common = {
        role: stored
        for roles in groups.values()
        if roles.keys() <= set(SHARED)
        for role, stored in roles.items()
    }
    for roles in groups.values():
        for family in ("vera", "randlora"):
            if f"{family}_lambda_b" in roles or f"{family}_lambda" in roles:
                roles |= {r: t for r, t in common.items() if r.startswith(family)}


__all__ = [
    "FAMILIES",
    "SHARED",
    "Form",
    "Scale",
    "Stored",
    "Tensors",
    "extras",
    "find_all",
    "find_in",
    "share",
]
