"""Keys → the modules that a file writes, before the model is known.

The keys of one stem are a group; what a family makes of a group is found with the shapes alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import FLOATS
from lorafind.formats import cloneofsimo, configuration, families, keys, prefixes, refuse
from lorafind.formats.adapter import Fetch
from lorafind.formats.families import Form, Scale, Stored
from lorafind.formats.names.table import Entry, flatten
from lorafind.formats.sighting import Sighting

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta


class Described(Protocol):
    """A tensor's description; TensorInfo is one."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass
class Group:
    """The tensors of one stem. roles: role → tensor; style: who writes such suffixes."""

    stem: str
    module: prefixes.Module
    roles: dict[str, Stored] = field(default_factory=dict)
    style: str = ""


@dataclass(slots=True)
class Found:
    """What a group changes: where it says it belongs, and how it is written.

    suffix: what follows the layer's name, empty for the ΔW of its weight; keys: all that belong to
    it; beside: those of them that hold no weights, alpha among them; alpha: the key of its alpha.
    """

    group: Group
    form: Form
    sighting: Sighting
    suffix: str
    keys: tuple[str, ...]
    beside: tuple[str, ...]
    alpha: str | None


@dataclass
class Sorted:
    """The keys of a file, sorted.

    groups: by stem; positions: numbered modules (:mod:`lorafind.formats.cloneofsimo`); plain: keys
    that stand for themselves; extras: bundled embeddings, by name; leftovers: keys without an
    effect → why; foreign: keys of families that are not read → the family; notes: for people.
    """

    groups: dict[str, Group] = field(default_factory=dict)
    positions: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    extras: dict[str, str] = field(default_factory=dict)
    leftovers: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sort(tensors: Mapping[str, Described]) -> Sorted:
    """Sort the keys by what their suffixes say. Raises NotAnAdapter where one name tells all."""
    marked = refuse.marked(list(tensors))
    if marked is not None:
        raise marked
    found = Sorted()
    for key, part in keys.split_all(tensors).items():
        position = cloneofsimo.split(key)
        if position is not None:
            found.positions[key] = position
        elif key.startswith("bundle_emb.") or (key[:1] == "<" and key[-1:] == ">"):
            found.extras[key] = key
        elif key.startswith("_aux."):
            found.leftovers[key] = ""
        elif part.role.startswith("plain"):
            found.plain.append(key)
        elif part.role == "foreign":
            found.foreign[key] = part.style
        else:
            _enter(found, part, Stored(key, tensors[key].dtype, tuple(tensors[key].shape)))
    for key, family in list(found.foreign.items()):
        # What stands beside such a tensor means something else than it does alone.
        group = found.groups.pop(keys.split(key).stem, None)
        if group is not None:
            found.foreign |= {t.key: family for t in group.roles.values()}
    return found


def _enter(found: Sorted, part: keys.Part, stored: Stored) -> None:
    group = found.groups.get(part.stem)
    if group is None:
        group = found.groups[part.stem] = Group(part.stem, prefixes.name_of(part.stem))
    if part.role in group.roles:
        first = group.roles[part.role].key
        found.leftovers[stored.key] = f"{first} says it already"
        found.notes.append(f"{stored.key} says again what {first} says: the first is read")
        return
    group.roles[part.role] = stored
    group.style = part.style or group.style


def find(
    found: Sorted, tensors: Mapping[str, Described], settings: configuration.Configuration
) -> list[Found]:
    """What the groups change. Raises NotAnAdapter where the shapes of one contradict each other."""
    if found.positions:
        return _positional(found, tensors)
    families.share({stem: group.roles for stem, group in found.groups.items()})
    changes = []
    for group in found.groups.values():
        alpha = group.roles.get("alpha")
        dotted = group.stem.removeprefix("base_model.model.")
        scale = settings.scale(group.module.component, dotted, alpha.key if alpha else None)
        changes += [_found(group, form) for form in families.find_all(group.roles, scale)]
    return changes


def in_layers(
    found: Sequence[Found], entries: Sequence[Entry | None]
) -> tuple[list[Found], list[Entry | None]]:
    """The same, with the ΔW of what needs the layer's shape for it, in the order of ``entries``."""
    made: dict[int, Form | None] = {}
    kept: list[tuple[Found, Entry | None]] = []
    for f, entry in zip(found, entries, strict=True):
        if entry is None or not f.form.parameters:
            kept.append((f, entry))
            continue
        mark = id(f.group)
        known = mark in made
        if not known:
            made[mark] = families.find_in(f.group.roles, entry.shape)
        form = made[mark]
        if form is None:
            kept.append((f, entry))
        elif not known:
            # One ΔW takes the place of all the parameters of a module.
            kept.append((_found(f.group, form), entry))
    return [f for f, _ in kept], [entry for _, entry in kept]


def _found(group: Group, form: Form) -> Found:
    roles = group.roles
    weights = [roles[role] for role in form.roles]
    for stored in weights:
        check_dtype(stored, FLOATS)
    if form.suffix == "modulation":
        form = _lying(form)
    kind = _kind(form)
    shape = form.layer if form.parameters else form.shape
    sighting = Sighting(group.module.component, group.module.flat, shape, form.dims, kind)
    alpha = roles["alpha"].key if "alpha" in roles and (form.scaled or kind == "weight") else None
    beside = tuple([roles[role].key for role in form.beside])
    if alpha is not None:
        beside = (*beside, alpha)
    keys = (*[stored.key for stored in weights], *beside)
    return Found(group, form, sighting, form.suffix, keys, beside, alpha)


def check_dtype(stored: Described, readable: Collection[str]) -> None:
    """Raise NotAnAdapter for a tensor whose numbers cannot be read."""
    if stored.dtype not in readable:
        why = f"its weights are stored as {stored.dtype}, which is not read yet"
        raise NotAnAdapter("unsupported", why)


def _lying(form: Form) -> Form:
    """Wan's modulation is a table of one row, however it is stored."""
    bind, shape = form.bind, form.shape[::-1]

    def lying(fetch: Fetch) -> Delta:
        from lorafind.formats.delta import Full

        found = bind(fetch)
        assert isinstance(found, Full)
        return replace(found, diff=found.diff.reshape(shape))

    return form._replace(shape=shape, layer=shape, bind=lying)


def _kind(form: Form) -> str:
    """Of :data:`lorafind.formats.names.table.KINDS`."""
    if form.parameters:
        return "parameters"
    if form.suffix == "bias":
        return "bias"
    return "norm" if form.suffix == "weight" else "weight"


def _positional(found: Sorted, tensors: Mapping[str, Described]) -> list[Found]:
    """Numbered modules: the shapes tell which layers the numbers mean."""
    by_part: dict[str, list[tuple[Group, Form]]] = {}
    for (part, number), roles in cloneofsimo.pairs(found.positions).items():
        group = Group(f"{part}:{number}", prefixes.Module("model", str(number), "cloneofsimo"))
        for role, key in roles.items():
            group.roles[role] = Stored(key, tensors[key].dtype, tuple(tensors[key].shape))
        found.groups[group.stem] = group
        for form in families.find_all(group.roles, Scale()):
            by_part.setdefault(part, []).append((group, form))
    changes = []
    for part, modules in by_part.items():
        names = cloneofsimo.names(part, [form.shape for _, form in modules])
        if names is None:
            found.notes.append("its modules are numbered, and the numbers fit no known model")
        for place, (group, form) in enumerate(modules):
            if names is not None:
                component, _, path = names[place].partition("/")
                group.module = prefixes.Module(component, flatten(path), "cloneofsimo")
            else:
                component = {"unet": "unet", "text_encoder": "te"}.get(part, "model")
                group.module = prefixes.Module(component, f"module_{place}", "cloneofsimo")
            group.style = "cloneofsimo"
            changes.append(_found(group, form))
    return changes
