"""What a file changes → modules under canonical names, each once.

A layer that a spelling fuses of several is cut into them by rows of ΔW, so that one change has the
same names in every spelling. A layer that a file writes twice is read once, never added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lorafind.formats import families
from lorafind.formats.adapter import Fetch, ModulePlan
from lorafind.formats.architectures import candidates
from lorafind.formats.detect import Detected, lookup
from lorafind.formats.families import Form, Stored
from lorafind.formats.grouping import Found
from lorafind.formats.names import unet
from lorafind.formats.names.places import place
from lorafind.formats.names.table import Entry
from lorafind.formats.names.tables import tables
from lorafind.formats.prefixes import UNET_STARTS, name_of
from lorafind.formats.sighting import Sighting

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


#: Whose prefixes are preferred where two write a layer in one spelling.
WRITERS = ("diffusers", "peft", "comfy", "onetrainer", "kohya")
#: Last word of a key that holds a whole tensor → what its canonical name ends with.
SET = {"weight": "set_weight", "scale": "set_weight", "bias": "set_bias"}


@dataclass
class Named:
    """What :func:`name` makes.

    uses: key → canonical names of the modules that it belongs to; leftovers: key → why it has no
    effect; extras, cuts as in :class:`Plan`.
    """

    modules: list[ModulePlan] = field(default_factory=list)
    uses: dict[str, list[str]] = field(default_factory=dict)
    leftovers: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Claim(NamedTuple):
    """A layer, what follows its name, and its rows of what the file writes; None for all."""

    layer: str
    suffix: str = ""
    rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The canonical name."""
        return f"{self.layer}.{self.suffix}" if self.suffix else self.layer


def name(found: Sequence[Found], entries: Sequence[Entry | None], detected: Detected) -> Named:
    """Name what was found; found and entries in one order."""
    named = Named()
    kept = _choose(named, found, entries)
    groups: dict[int, list[int]] = {}
    for i, f in enumerate(found):
        for claim in kept[i]:
            named.modules.append(_module(f, claim))
            for key in f.keys:
                named.uses.setdefault(key, []).append(claim.name)
        if kept[i]:
            groups.setdefault(id(f.group), []).append(i)
    for members in groups.values():
        # Extras are called after the weight where there is one.
        first = min(members, key=lambda i: found[i].sighting.kind != "weight")
        forms = [found[i].form for i in members]
        _extras(named, found[first], forms, entries[first], kept[first])
    for key in named.uses:
        # An alpha can belong to a second writing as well as to the first.
        named.leftovers.pop(key, None)
    strangers = entries.count(None)
    if strangers and detected.known:
        named.notes.append(f"{strangers} modules are not part of {detected.architecture}")
    return named


def _choose(
    named: Named, found: Sequence[Found], entries: Sequence[Entry | None]
) -> list[list[Claim]]:
    """The claims of each, no name twice."""
    claims = [_claims(f, e) for f, e in zip(found, entries, strict=True)]
    kept: list[list[Claim]] = [[] for _ in found]
    taken: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for i in sorted(range(len(found)), key=lambda i: (*_rank(found[i], entries[i]), i)):
        group = found[i].group
        kept[i] = [claim for claim in claims[i] if claim.name not in taken]
        if len(kept[i]) < len(claims[i]):
            first = next(taken[claim.name] for claim in claims[i] if claim.name in taken)
            twice.append((group.stem, first))
            if not kept[i]:
                mine = [stored.key for stored in group.roles.values()]
                named.leftovers |= dict.fromkeys(mine, f"{first} writes the same layer")
        taken.update({claim.name: group.stem for claim in kept[i]})
    if twice:
        stem, first = twice[0]
        what = "1 layer is" if len(twice) == 1 else f"{len(twice)} layers are"
        named.notes.append(f"{what} written twice and read once: {stem} as {first} does already")
    return kept


def _rank(f: Found, entry: Entry | None) -> tuple[int, int]:
    """Which of two writings of a layer is read: the lowest."""
    spelling = 0
    if entry is not None and entry.spelling:
        order = ("sgm",) if entry.owner in unet.UNETS else tables()[entry.owner].spellings
        spelling = 1 + order.index(entry.spelling)
    writer = f.group.module.writer
    return spelling, WRITERS.index(writer) if writer in WRITERS else len(WRITERS)


def _claims(f: Found, entry: Entry | None) -> list[Claim]:
    s, suffix = f.sighting, f.suffix
    if entry is None:
        return [Claim(f"{_component(s)}/{s.flat}", suffix)]
    fits = entry.fits(s.shape, s.kind)
    if fits and suffix == "modulation":
        suffix = ""
    if fits and len(entry.parts) > 1:
        if f.form.fused == "rows" and f.form.shape[0] == entry.shape[0]:
            return _parts(entry, suffix)
        if f.form.fused == "same":
            return [claim._replace(rows=None) for claim in _parts(entry, suffix)]
    rows, columns = entry.shape
    plain = s.kind == "parameters" or s.shape == (rows, 1 if s.kind == "bias" else columns)
    size = "" if plain else f"[{s.shape[0]}×{s.shape[1]}]"
    return [Claim(f"{whole(entry)}{size}", suffix)]


def _parts(entry: Entry, suffix: str) -> list[Claim]:
    """The layers of an entry; a single one has all the rows."""
    if len(entry.parts) == 1:
        return [Claim(f"{entry.component}/{entry.path}", suffix)]
    return [
        Claim(f"{entry.component}/{layer.path}", suffix, (start, stop))
        for layer, start, stop in entry.cuts()
    ]


def whole(entry: Entry) -> str:
    """One canonical name for all parts of a fused layer: ``…attn.to_q+to_k+to_v``."""
    words = [layer.path.split(".") for layer in entry.parts]
    common = 0
    for column in zip(*words, strict=False):
        if len(words) == 1 or len(set(column)) > 1:
            break
        common += 1
    tails = "+".join(".".join(path[common:]) for path in words)
    return f"{entry.component}/{'.'.join([*words[0][:common], tails])}"


def _component(s: Sighting) -> str:
    """The component of a layer without a table: prefixes differ between writers, names do not."""
    if s.is_text:
        return "te" if s.component in ("text", "te_any", "te_prior") else s.component
    return "unet" if s.flat.startswith(UNET_STARTS) else "model"


def _module(f: Found, claim: Claim) -> ModulePlan:
    form, kind = f.form, f.sighting.kind
    where = place(claim.name, vector=kind in ("norm", "bias"), kernel=form.kernel > 1)
    shape, bind = form.shape, form.bind
    if claim.rows is not None:
        start, stop = claim.rows
        shape, bind = (stop - start, form.shape[1]), _rows(form.bind, start, stop)
    return ModulePlan(
        place=where,
        family=form.family,
        keys=f.keys,
        shape=shape,
        rank=form.rank,
        bind=bind,
        alpha=f.alpha,
        beside=f.beside,
        parameters=form.parameters,
    )


def _rows(bind: Callable[[Fetch], Delta], start: int, stop: int) -> Callable[[Fetch], Delta]:
    return lambda fetch: bind(fetch).rows(start, stop)


# ---------------------------------------------------------------------------- beside ΔW


def _extras(
    named: Named, f: Found, forms: Sequence[Form], entry: Entry | None, claims: Sequence[Claim]
) -> None:
    """What acts beside ΔW: by rows where the layer is cut and there is one number, or row, each."""
    roles, rows = f.group.roles, f.form.shape[0]
    for suffix, role in families.extras(roles, forms).items():
        stored = roles[role]
        if role == "magnitude" and not _of_rows(stored, rows):
            suffix = f"{suffix}.input"
        elif role in ("magnitude", "set_weight") and stored.shape[:1] == (rows,):
            _cut(named, stored.key, claims, suffix)
            continue
        # What cannot be cut belongs to all parts together, and to none of them.
        layer = whole(entry) if entry is not None and len(claims) > 1 else claims[0].layer
        named.extras[f"{layer}.{suffix}"] = stored.key


def _of_rows(stored: Stored, rows: int) -> bool:
    """True where there is one number per row of ΔW."""
    return stored.shape[:1] == (rows,) and all(n == 1 for n in stored.shape[1:])


def _cut(named: Named, key: str, claims: Sequence[Claim], suffix: str) -> None:
    for claim in claims:
        extra = f"{claim.layer}.{suffix}"
        named.extras[extra] = key
        if claim.rows is not None:
            named.cuts[extra] = claim.rows


def name_plain(named: Named, tensors: Mapping[str, Sequence[int]], detected: Detected) -> None:
    """Name the weights that a file holds whole. tensors: key → shape."""
    owners = list(candidates(detected.architecture)) if detected.known else []
    for key, shape in tensors.items():
        stem, _, last = key.rpartition(".")
        module = name_of(stem)
        entry = lookup(owners, module.flat) if last in SET and module.component != "te" else None
        if entry is not None:
            kind = "bias" if last == "bias" else "norm" if entry.parts[0].norm else "weight"
            size = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
            if entry.fits(size, kind):
                _cut(named, key, _parts(entry, ""), SET[last])
                continue
        module = name_of(key)
        named.extras[f"{module.component}/{module.flat}"] = key
