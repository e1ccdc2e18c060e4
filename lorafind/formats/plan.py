"""Names, dtypes and shapes of a file's tensors → a Plan that accounts for every key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from lorafind.files import sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import DTYPE_BITS, FLOATS, Header
from lorafind.formats import cloneofsimo, configuration, keys, prefixes, refuse
from lorafind.formats.adapter import ModulePlan, Plan
from lorafind.formats.detect import Detected, Sighting, detect
from lorafind.formats.families import Form, Scale, find, full
from lorafind.formats.families.common import Stored
from lorafind.formats.names.places import place
from lorafind.formats.names.table import flatten


class Described(Protocol):
    """A tensor's description; TensorInfo is one."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


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
    reader = _Reader(tensors, configuration.read(metadata, config))
    reader.take_apart()
    return reader.plan()


def plan_of(header: Header, config: Mapping[str, Any] | None = None) -> Plan:
    """:func:`understand`, once for all files with the same tensors and scales."""
    text = header.metadata.get(configuration.METADATA_KEY)
    settings = None if config is None else json.dumps(config, sort_keys=True)
    plan = _cached(_Tensors(header), text, settings)
    if isinstance(plan, NotAnAdapter):
        raise NotAnAdapter(plan.outcome, plan.reason)
    hints = sidecars.hints(header.metadata)
    return replace(plan, hints=hints) if hints else plan


def weights_of(plan: Plan, header: Header) -> tuple[list[str], str]:
    """The keys of the factors, without alpha and single numbers, and the dtype of the file.

    Where several are mixed the finest counts: a copy must never seem better than it is.
    """
    keys = [
        key
        for module in plan.modules
        for key in module.keys
        if key != module.alpha and header.tensors[key].shape
    ]
    sizes: Counter[str] = Counter()
    for key in keys:
        info = header.tensors[key]
        sizes[info.dtype] += info.end - info.begin
    return keys, max(sizes, key=lambda d: (DTYPE_BITS[d], sizes[d]), default="F32")


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
def _cached(header: _Tensors, text: str | None, settings: str | None) -> Plan | NotAnAdapter:
    metadata = {} if text is None else {configuration.METADATA_KEY: text}
    config = None if settings is None else json.loads(settings)
    try:
        return understand(header.tensors, metadata, config)
    except NotAnAdapter as error:
        return error


@dataclass
class _Group:
    """The tensors of one stem. roles: role → tensor; scale: of all of them."""

    stem: str
    module: prefixes.Module
    roles: dict[str, Stored] = field(default_factory=dict)
    style: str = ""


@dataclass
class _Found:
    """A ΔW: where it says it belongs, and how it is written."""

    group: _Group
    form: Form
    sighting: Sighting
    suffix: str
    keys: tuple[str, ...]
    alpha: str | None


class _Reader:
    def __init__(
        self, tensors: Mapping[str, Described], settings: configuration.Configuration
    ) -> None:
        self.tensors = tensors
        self.settings = settings
        self.groups: dict[str, _Group] = {}
        self.fates: dict[str, str] = dict.fromkeys(tensors, "unknown")
        self.extras: dict[str, str] = {}
        self.plain: list[str] = []
        self.foreign: dict[str, str] = {}
        self.notes: list[str] = []
        self.positions: dict[str, tuple[str, int, str]] = {}

    # -- keys → groups

    def take_apart(self) -> None:
        """Sort the keys into groups of one stem, extras, plain weights and foreign families."""
        marked = refuse.marked(list(self.tensors))
        if marked is not None:
            raise marked
        for key, info in self.tensors.items():
            position = cloneofsimo.split(key)
            if position is not None:
                self.positions[key] = position
            elif key.startswith("bundle_emb.") or (key[:1] == "<" and key[-1:] == ">"):
                self.extras[key] = key
            elif key.startswith("_aux."):
                self.fates[key] = "leftover"
            else:
                part = keys.split(key)
                if part.role.startswith("plain"):
                    self.plain.append(key)
                elif part.role == "foreign":
                    self.foreign[key] = part.style
                else:
                    self._enter(part, Stored(key, info.dtype, tuple(info.shape)))
        for key, family in list(self.foreign.items()):
            # What stands beside such a tensor means something else than it does alone.
            group = self.groups.pop(keys.split(key).stem, None)
            if group is not None:
                self.foreign |= {t.key: family for t in group.roles.values()}
        for stem, group in list(self.groups.items()):
            if group.roles.keys() >= keys.GLORA:
                self.foreign.update({t.key: "GLoRA" for t in group.roles.values()})
                del self.groups[stem]
            elif group.roles.keys() <= keys.GLORA:
                self.plain += [t.key for t in group.roles.values()]
                del self.groups[stem]

    def _enter(self, part: keys.Part, stored: Stored) -> None:
        group = self.groups.get(part.stem)
        if group is None:
            group = self.groups[part.stem] = _Group(part.stem, prefixes.name_of(part.stem))
        if part.role in group.roles:
            self.notes.append(f"{stored.key} says again what {group.roles[part.role].key} says")
            return
        group.roles[part.role] = stored
        group.style = part.style or group.style

    # -- groups → Plan

    def plan(self) -> Plan:
        """Name everything, or raise what the file is instead."""
        found = self._positional() if self.positions else self._named()
        if not found:
            raise self._nothing()
        allowed = cloneofsimo.ARCHITECTURES if self.positions else None
        detected = detect([f.sighting for f in found], allowed)
        self.notes += detected.notes
        modules = self._modules(found, detected)
        self._rest({f.group.stem for f in found})
        return Plan(
            architecture=detected.architecture,
            family=self._family(modules, found),
            spelling=_spelling(found, detected),
            modules=tuple(modules),
            extras=self.extras,
            keys=self.fates,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _named(self) -> list[_Found]:
        found = []
        for group in self.groups.values():
            alpha = group.roles.get("alpha")
            module = group.module
            dotted = _dotted(group.stem)
            scale = self.settings.scale(module.component, dotted, alpha.key if alpha else None)
            if alpha is not None and any(n != 1 for n in alpha.shape):
                raise NotAnAdapter("invalid", f"{alpha.key} is no single number")
            form = find(group.roles, scale)
            if form is not None:
                found.append(self._sight(group, form, "", alpha))
            for role, (suffix, _) in full.VECTORS.items():
                if role in group.roles:
                    rank = form.rank if form is not None else None
                    vector = full.find_vector(group.roles, role, scale, rank)
                    if vector is not None:
                        found.append(self._sight(group, vector, suffix, None))
        return found

    def _sight(self, group: _Group, form: Form, suffix: str, alpha: Stored | None) -> _Found:
        used = [group.roles[role] for role in form.roles]
        for stored in used:
            if stored.dtype not in FLOATS:
                why = f"its weights are stored as {stored.dtype}, which is not read yet"
                raise NotAnAdapter("unsupported", why)
        kind = "weight"
        if suffix:
            kind = full.VECTORS[form.roles[0]][1]
        elif form.family == "full" and form.dims == 1:
            kind, suffix = "norm", "weight"
        sighting = Sighting(group.module.component, group.module.flat, form.shape, form.dims, kind)
        names = [t.key for t in used]
        key = alpha.key if alpha is not None else None
        if key is not None:
            names.append(key)
        return _Found(group, form, sighting, suffix, tuple(names), key)

    def _positional(self) -> list[_Found]:
        found = []
        by_part: dict[str, list[tuple[_Group, Form]]] = {}
        for (part, index), roles in cloneofsimo.pairs(self.positions).items():
            stored = {
                role: Stored(key, self.tensors[key].dtype, tuple(self.tensors[key].shape))
                for role, key in roles.items()
            }
            group = _Group(f"{part}:{index}", prefixes.Module("model", str(index), "cloneofsimo"))
            group.roles.update(stored)
            self.groups[group.stem] = group
            form = find(stored, Scale())
            if form is not None:
                by_part.setdefault(part, []).append((group, form))
        for part, modules in by_part.items():
            names = cloneofsimo.names(part, [form.shape for _, form in modules])
            if names is None:
                self.notes.append("its modules are numbered, and the numbers fit no known model")
            for place_in_list, (group, form) in enumerate(modules):
                if names is not None:
                    component, _, path = names[place_in_list].partition("/")
                    module = prefixes.Module(component, flatten(path), "cloneofsimo")
                else:
                    component = {"unet": "unet", "text_encoder": "te"}.get(part, "model")
                    module = prefixes.Module(component, f"module_{place_in_list}", "cloneofsimo")
                group.module, group.style = module, "cloneofsimo"
                found.append(self._sight(group, form, "", None))
        return found

    def _modules(self, found: list[_Found], detected: Detected) -> list[ModulePlan]:
        modules: list[ModulePlan] = []
        taken: dict[str, str] = {}
        strangers = 0
        for f, entry in zip(found, detected.entries, strict=True):
            s = f.sighting
            if entry is not None:
                name = f"{entry.component}/{entry.path}"
                if not entry.fits(s.shape, s.kind):
                    name += f"[{s.shape[0]}×{s.shape[1]}]"
            else:
                name = f"{_component(s)}/{s.flat}"
                strangers += detected.known
            if f.suffix:
                name += f".{f.suffix}"
            if name in taken:
                self.notes.append(f"{f.group.stem} writes {name}, as {taken[name]} does already")
                continue
            taken[name] = f.group.stem
            where = place(name, vector=s.kind != "weight", kernel=f.form.kernel > 1)
            form = f.form
            modules.append(
                ModulePlan(where, form.family, f.keys, form.shape, form.rank, form.bind, f.alpha)
            )
            for key in f.keys:
                self.fates[key] = f"module:{name}"
            magnitude = f.group.roles.get("magnitude")
            if magnitude is not None and not f.suffix:
                self.extras[f"{name}.dora_scale"] = magnitude.key
            fixed = f.group.roles.get("set_weight")
            if fixed is not None:
                self.extras[f"{name}.set_weight"] = fixed.key
        if strangers:
            self.notes.append(f"{strangers} modules are not part of {detected.architecture}")
        return modules

    def _rest(self, used: set[str]) -> None:
        """What becomes of the keys that no ΔW needs."""
        for key in self.plain:
            module = prefixes.name_of(key)
            self.extras[f"{module.component}/{module.flat}"] = key
        for name, key in self.extras.items():
            self.fates[key] = f"extra:{name}"
        orphans = []
        for group in self.groups.values():
            for stored in group.roles.values():
                if self.fates[stored.key] == "unknown" and group.stem not in used:
                    self.fates[stored.key] = "orphan"
                    orphans.append(stored.key)
        if orphans:
            self.notes.append(f"{len(orphans)} keys lack their other half, first {orphans[0]}")
        if self.foreign:
            families = ", ".join(sorted(set(self.foreign.values())))
            self.notes.append(f"{len(self.foreign)} keys of {families} are not read yet")

    def _family(self, modules: list[ModulePlan], found: list[_Found]) -> str:
        if any(name.endswith(".dora_scale") for name in self.extras):
            self.notes.append("DoRA: ΔW is s·B·A, the magnitudes are kept apart")
            return "dora"
        families = {m.family for m in modules if not m.place.vector} or {"full"}
        if len(families) > 1:
            return "mixed"
        family = families.pop()
        if family == "lora" and any(f.form.kernel > 1 for f in found):
            return "locon"
        return family

    def _nothing(self) -> NotAnAdapter:
        if self.foreign:
            family = Counter(self.foreign.values()).most_common(1)[0][0]
            return NotAnAdapter("unsupported", f"it is {family}, which is not read yet")
        if self.groups:
            first = next(iter(self.groups.values()))
            key = next(iter(first.roles.values())).key
            return NotAnAdapter(
                "unsupported", f"no module in it is whole: the other half of {key} is missing"
            )
        return refuse.without_modules({k: tuple(t.shape) for k, t in self.tensors.items()})


def _component(s: Sighting) -> str:
    """The component of a layer without a table: prefixes differ between writers, names do not."""
    if s.component.startswith("te"):
        return "te" if s.component == "text" else s.component
    return "unet" if s.flat.startswith(prefixes.UNET_STARTS) else "model"


def _dotted(stem: str) -> str:
    """The module's name as PEFT's patterns see it."""
    return stem.removeprefix("base_model.model.")


#: Writer → spelling; what a suffix style says where there is no prefix.
STYLES = {"diffusers-old": "diffusers-old", "diffusers": "diffusers", "peft": "peft"}


def _spelling(found: list[_Found], detected: Detected) -> str:
    main: Counter[str] = Counter()
    text: Counter[str] = Counter()
    for f, entry in zip(found, detected.entries, strict=True):
        group = f.group
        if group.style in ("cloneofsimo", "diffusers-old", "lora-vit"):
            spelling = group.style
        elif entry is not None and entry.spelling:
            spelling = entry.spelling
        else:
            spelling = group.module.writer or STYLES.get(group.style, "bare")
        (text if f.sighting.component.startswith("te") else main)[spelling] += 1
    if "onetrainer" in text:
        return "onetrainer"
    # The text encoders have one name everywhere: they do not make an SGM file a mixed one.
    if set(main) == {"sgm"} and set(text) <= {"kohya"}:
        return "sgm"
    spellings = set(main) | set(text)
    return spellings.pop() if len(spellings) == 1 else "mixed"
