"""Which text encoders a file adapts: by the names and widths of their layers.

The number in a prefix means another encoder in every model (te2 is CLIP-bigG, T5, or CLIP-L), so it
says at most how many encoders there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorafind.formats.names import clip
from lorafind.formats.names.pattern import outline
from lorafind.formats.names.table import Entry
from lorafind.formats.names.tables import tables
from lorafind.formats.sighting import Sighting

#: The encoders of the models whose tables are no files.
ENCODERS = {
    "sd1": frozenset({"te1"}),
    "sd2": frozenset({"te"}),
    "sdxl": frozenset({"te1", "te2"}),
    "sdxl-refiner": frozenset({"te2"}),
}
#: Of the layers of a text encoder, the share that must have the right shape.
FITTING = 0.95


@dataclass(frozen=True)
class Encoder:
    """One text encoder that was found.

    owners: what it may be, names of tables; prefix: the component that the keys say.
    """

    owners: frozenset[str]
    prefix: str

    def may_belong(self, architecture: str) -> bool:
        """True where a model has such an encoder, and as many as the prefix implies."""
        own = encoders(architecture)
        if not self.owners & own:
            return False
        if self.prefix == "te_prior":
            return architecture.startswith("cascade")
        if self.prefix == "te":
            return len(own) == 1
        return len(own) > 1 or self.prefix not in ("te2", "te3", "te4")


def encoders(architecture: str) -> frozenset[str]:
    """The text encoders of a model."""
    if architecture in ENCODERS:
        return ENCODERS[architecture]
    return frozenset(tables()[architecture].encoders)


def find(sightings: Sequence[Sighting]) -> tuple[list[Entry | None], list[Encoder]]:
    """The layer that each sighting is, None for what is of no known encoder; and the encoders."""
    entries = [_clip(s) for s in sightings]
    found = dict.fromkeys(
        Encoder(frozenset({entry.owner}), s.component)
        for s, entry in zip(sightings, entries, strict=True)
        if entry is not None
    )
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(sightings):
        if entries[i] is None and s.is_text:
            groups.setdefault(s.component, []).append(i)
    for prefix, group in groups.items():
        # Several encoders can stand under one prefix.
        while group:
            owners, matches = _largest([sightings[i] for i in group])
            if not owners:
                break
            found[Encoder(owners, prefix)] = None
            for i, entry in zip(group, matches, strict=True):
                entries[i] = entry
            group = [i for i, entry in zip(group, matches, strict=True) if entry is None]
    return entries, list(found)


def _clip(s: Sighting) -> Entry | None:
    """The layer of a CLIP text encoder that a sighting is."""
    if not (s.is_text or s.component in ("text", "model")):
        return None
    return next((e for e in clip.index().get(s.flat).values() if e.fits(s.shape, s.kind)), None)


def _largest(sightings: Sequence[Sighting]) -> tuple[frozenset[str], list[Entry | None]]:
    """The tables that most of the sightings fit, and their layers in the first of them."""
    names = [outline(s.flat) for s in sightings]
    by_owner = {
        owner: [m.entry if (m := table.find(name)) else None for name in names]
        for owner, table in tables().items()
        if owner.startswith("te_")
    }
    fits: Counter[str] = Counter()
    for owner, matches in by_owner.items():
        named = [(s, e) for s, e in zip(sightings, matches, strict=True) if e is not None]
        count = sum(e.fits(s.shape, s.kind) for s, e in named)
        if count >= FITTING * len(named):
            fits[owner] = count
    best = max(fits.values(), default=0)
    if not best:
        return frozenset(), []
    owners = sorted(owner for owner, count in fits.items() if count == best)
    return frozenset(owners), by_owner[owners[0]]
