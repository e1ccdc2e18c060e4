"""Names, dtypes and shapes of a file's tensors → a Plan that accounts for every key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lorafind.files import sidecars
from lorafind.files.header import DTYPE_BITS, READABLE, Header
from lorafind.files.outcome import NotAnAdapter
from lorafind.formats import cloneofsimo, configuration, grouping, naming, refuse
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.detect import detect
from lorafind.formats.grouping import Described, Found, Sorted
from lorafind.formats.spelling import spelling

#: More modules than these are not named one by one.
MANY = 16


def understand(
    tensors: Mapping[str, Described],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """How every key of a file is to be read; no tensor is needed.

    metadata: the header's texts, of which only the scales count; config: ``adapter_config.json``.
    Raises NotAnAdapter with the name of what the file is instead, ``invalid`` where the shapes of
    a module contradict each other.
    """
    keys = grouping.sort(tensors)
    found = grouping.find(keys, tensors, configuration.read(metadata, config))
    if not found:
        raise _nothing(keys, {key: tuple(info.shape) for key, info in tensors.items()})
    allowed = cloneofsimo.ARCHITECTURES if keys.positions else None
    detected = detect([f.sighting for f in found], allowed)
    found, entries = grouping.in_layers(found, detected.entries)
    named = naming.name(found, entries, detected)
    naming.name_plain(named, {key: tensors[key].shape for key in keys.plain}, detected)
    extras = keys.extras | named.extras
    for key in extras.values():
        grouping.check_dtype(tensors[key], READABLE)
    fates = _fates(tensors, keys, named, extras)
    notes = [*keys.notes, *detected.notes, *named.notes, *_unread(fates, keys)]
    family = _family(named.modules, found)
    if any(".dora_scale" in name for name in extras):
        family = "dora"
        notes.append("DoRA: ΔW is s·B·A, the magnitudes are kept apart")
    return Plan(
        architecture=detected.architecture,
        family=family,
        spelling=spelling(found, entries),
        modules=tuple(named.modules),
        extras=extras,
        cuts=named.cuts,
        keys=fates,
        notes=tuple(dict.fromkeys(notes)),
    )


def plan_of(header: Header, config: Mapping[str, Any] | None = None) -> Plan:
    """:func:`understand`, once for all files with the same tensors and scales."""
    texts = tuple(sorted(configuration.of_header(header.metadata).items()))
    settings = None if config is None else json.dumps(config, sort_keys=True)
    plan = _cached(_Tensors(header), texts, settings)
    if isinstance(plan, NotAnAdapter):
        raise NotAnAdapter(plan.outcome, plan.reason)
    hints = sidecars.hints(header.metadata)
    return replace(plan, hints=hints) if hints else plan


def weights_of(plan: Plan, header: Header) -> tuple[list[str], str]:
    """The keys of the factors, without single numbers, and the dtype of the file.

    Where several are mixed the finest counts: a copy must never seem better than it is.
    """
    keys = dict.fromkeys(
        key for module in plan.modules for key in module.weights if header.tensors[key].shape
    )
    sizes: Counter[str] = Counter()
    for key in keys:
        info = header.tensors[key]
        sizes[info.dtype] += info.end - info.begin
    return list(keys), max(sizes, key=lambda d: (DTYPE_BITS[d], sizes[d]), default="F32")


class _Tensors:
    """A header's tensors as a key of the cache."""

    def __init__(self, header: Header) -> None:
        self.tensors = header.tensors
        self.digest = header.names_digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensors) and self.digest == other.digest


@lru_cache(maxsize=128)
def _cached(
    header: _Tensors, texts: tuple[tuple[str, str], ...], settings: str | None
) -> Plan | NotAnAdapter:
    config = None if settings is None else json.loads(settings)
    try:
        return understand(header.tensors, dict(texts), config)
    except NotAnAdapter as error:
        return error


def _fates(
    tensors: Mapping[str, Described], keys: Sorted, named: naming.Named, extras: Mapping[str, str]
) -> dict[str, str]:
    """What becomes of every key; see :class:`Plan`."""
    fates = dict.fromkeys(tensors, "unknown")
    for group in keys.groups.values():
        own = _keys(group)
        if named.uses.keys().isdisjoint(own):
            fates |= dict.fromkeys(own, "orphan")
    for key, why in (keys.leftovers | named.leftovers).items():
        fates[key] = f"leftover:{why}" if why else "leftover"
    belongs: dict[str, list[str]] = {}
    for name, key in extras.items():
        belongs.setdefault(key, []).append(name)
    fates |= {key: f"extra:{' + '.join(names)}" for key, names in belongs.items()}
    fates |= {key: f"module:{_together(names)}" for key, names in named.uses.items()}
    return fates


def _together(names: Sequence[str]) -> str:
    """Those that share a key: the parts of a layer, or all modules of a file."""
    if len(names) > MANY:
        return f"{names[0]} and {len(names) - 1} others"
    return " + ".join(names)


def _keys(group: grouping.Group) -> list[str]:
    return [key for key, _, _ in group.roles.values()]


def _unread(fates: Mapping[str, str], keys: Sorted) -> list[str]:
    notes = []
    orphans = [key for key, fate in fates.items() if fate == "orphan"]
    if orphans:
        notes.append(f"{len(orphans)} keys lack their other half, first {orphans[0]}")
    if keys.foreign:
        names = ", ".join(sorted(set(keys.foreign.values())))
        notes.append(f"{len(keys.foreign)} keys of {names} are not read yet")
    return notes


def _family(modules: Sequence[ModulePlan], found: Sequence[Found]) -> str:
    families = {m.family for m in modules if not m.place.vector} or {"full"}
    if len(families) > 1:
        return "mixed"
    family = families.pop()
    if family == "lora" and any(f.form.kernel > 1 for f in found):
        return "locon"
    return family


def _nothing(keys: Sorted, shapes: Mapping[str, tuple[int, ...]]) -> NotAnAdapter:
    """What a file is in which nothing changes a layer."""
    if keys.foreign:
        family = Counter(keys.foreign.values()).most_common(1)[0][0]
        return NotAnAdapter("unsupported", f"it is {family}, which is not read yet")
    if keys.groups:
        first = _keys(next(iter(keys.groups.values())))[0]
        return NotAnAdapter(
            "unsupported", f"no module in it is whole: the other half of {first} is missing"
        )
    return refuse.without_modules(shapes)
