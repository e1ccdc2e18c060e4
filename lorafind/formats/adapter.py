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
        ``te1`` CLIP-L, ``te2`` CLIP-bigG, ``te`` OpenCLIP-H, ``model`` where none is known).
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

    family: ``lora``, ``loha``, ``lokr`` or ``full``.
    keys: every key of the file that belongs to it (alpha included); alpha: the key of its alpha.
    shape: (o, n) of ΔW; rank as in :attr:`Delta.rank`.
    bind: makes the Delta from a function that returns the stored tensor of a key.
    """

    place: Place
    family: str
    keys: tuple[str, ...]
    shape: tuple[int, int]
    rank: int
    bind: Callable[[Fetch], Delta]
    alpha: str | None = None

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.place.name


@dataclass(frozen=True)
class Plan:
    """How every key of a file is understood.

    architecture: ``sd1``, ``sd2``, ``sdxl``, ``sdxl-refiner``, ``other:<8 hex of the layout>``, …
    family: of the file: ``lora``, ``locon``, ``loha``, ``lokr``, ``full``, ``dora``, ``mixed``.
    spelling: ``kohya``, ``sgm``, ``diffusers``, ``diffusers-old``, ``peft``, ``onetrainer``,
        ``cloneofsimo``, … (``mixed`` where a file holds several).
    extras: canonical name → key of what acts on the picture but is no ΔW (DoRA magnitudes,
        bundled embeddings, fully saved modules). Adapters whose extras differ are never copies.
    keys: every key → ``module:<name>``, ``extra:<name>``, ``leftover``, ``orphan`` or ``unknown``.
    notes: sentences for people.
    hints: architectures suggested by metadata, and other facts that are shown, never trusted.
    """

    architecture: str
    family: str
    spelling: str
    modules: tuple[ModulePlan, ...]
    extras: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hints: dict[str, Any] = field(default_factory=dict)

    @property
    def unknown_keys(self) -> list[str]:
        """Keys that were not understood."""
        return [key for key, how in self.keys.items() if how in ("unknown", "orphan")]


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
        return self.fetch(self.plan.extras[name])
