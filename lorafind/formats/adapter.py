"""What a file holds once it is understood: an adapter, a set of modules.

A :class:`Plan` is made from names, dtypes and shapes alone (no tensor is read) and is shared by
all files with the same header; an :class:`Adapter` is a plan with a way to get the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorafind.formats.groups import GROUPS as GROUPS

if TYPE_CHECKING:
    # A plan is made of names and shapes: `info` of a header does without torch.
    from torch import Tensor

    from lorafind.formats.delta import Delta

Fetch = Callable[[str], "Tensor"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the base model a module sits; a function of its canonical name alone.

    name: ``component/path``, e.g. ``unet/down_blocks.0.attentions.0.proj_in`` (components ``unet``,
        ``transformer``, ``te1`` CLIP-L, ``te2`` CLIP-bigG, ``te`` OpenCLIP-H, ``te_t5`` T5-XXL,
        ``te_llm`` a language model, ``model`` where none is known).
    group: one of GROUPS.
    late: False in the first half of the network's depth, True in the second.
    vector: True for a bias or norm difference (ΔW is o × 1): it counts for identity, not for style.
    """

    name: str
    group: str
    late: bool
    vector: bool = False

    @property
    def component(self) -> str:
        """The part of the model: the name up to the slash."""
        return self.name.partition("/")[0]


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """One module before its tensors are read.

    family: ``lora``, ``loha``, ``lokr``, ``full``, …
    keys: every key of the file that belongs to it (alpha included), which other modules may share
        where a layer is fused; alpha: the key of its alpha; beside: those of them that hold no
        weights (alpha, flags, indices).
    parameters: True where the numbers are parameters of a rotation or rescaling, which would need
        the base weight for a ΔW: they are compared as they stand, with the like only.
    shape: (o, n) of ΔW; rank: as the shapes state it (:attr:`Delta.rank` can be lower in a part).
    bind: makes the Delta from a function that returns the stored tensor of a key.
    """

    place: Place
    family: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    rank: int
    bind: Callable[[Fetch], Delta]
    alpha: str | None = None
    beside: tuple[str, ...] = ()
    parameters: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """The keys of the tensors that it is made of."""
        return tuple(k for k in self.keys if k != self.alpha and k not in self.beside)

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.place.name


@dataclass(frozen=True)
class Plan:
    """How every key of a file is understood.

    architecture: ``sd1``, ``flux1``, ``flux1-or-chroma``, ``other:<8 hex of the layout>``, … as in
        :mod:`lorafind.formats.architectures`.
    family: of the file: ``lora``, ``locon``, ``loha``, ``lokr``, ``full``, ``dora``, ``mixed``, …
    spelling: ``kohya``, ``sgm``, ``diffusers``, ``diffusers-old``, ``peft``, ``comfy``, ``native``,
        ``onetrainer``, ``xlabs``, ``cloneofsimo``, … (``mixed`` where a file holds several).
    extras: canonical name → key of what acts on the picture but is no ΔW (DoRA magnitudes,
        bundled embeddings, fully saved modules). Adapters whose extras differ are never copies.
    cuts: extra → (first row, row after the last), where it is a part of the tensor.
    keys: every key → ``module:<name>`` or ``extra:<name>`` (``a + b + c`` where it belongs to
        several), ``leftover`` or ``leftover:<why>``, ``orphan`` or ``unknown``.
    notes: sentences for people.
    hints: architectures suggested by metadata, and other facts that are shown, never trusted.
    """

    architecture: str
    family: str
    spelling: str
    modules: tuple[ModulePlan, ...]
    extras: dict[str, str] = field(default_factory=dict)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hints: dict[str, Any] = field(default_factory=dict)

    @property
    def unknown_keys(self) -> list[str]:
        """Keys that were not understood."""
        return [key for key, how in self.keys.items() if how in ("unknown", "orphan")]

    @property
    def unread_keys(self) -> list[str]:
        """Keys that may act on the picture and are not read: not understood, or written twice."""
        known = ("module:", "extra:")
        return [
            k for k, how in self.keys.items() if not how.startswith(known) and how != "leftover"
        ]


class Bound(Mapping[str, "Delta"]):
    """The modules of a plan as a mapping of canonical names to Deltas, bound at each access."""

    def __init__(self, plan: Plan, fetch: Fetch) -> None:
        self._plans = {module.name: module for module in plan.modules}
        self._fetch = fetch

    def __getitem__(self, name: str) -> Delta:
        return self._plans[name].bind(self._fetch)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)


@dataclass(frozen=True)
class Adapter:
    """A plan and its tensors.

    ``modules[name]`` reads what it needs when it is asked, so that one module at a time is in
    memory; modules whose ΔW is exactly zero are among them (``Delta.is_zero``).
    """

    plan: Plan
    fetch: Fetch
    dtype: str
    effective_dtype: str

    @property
    def modules(self) -> Bound:
        """Canonical name → ΔW."""
        return Bound(self.plan, self.fetch)

    def extra(self, name: str) -> Tensor:
        """The tensor of an extra (see :class:`Plan`)."""
        tensor = self.fetch(self.plan.extras[name])
        return tensor[slice(*self.plan.cuts[name])] if name in self.plan.cuts else tensor
