"""Which base model an adapter is for: from names and shapes, never from metadata.

FORMATS of ComfyUI (``model_detection.py``), diffusers and sd-scripts say what tells models apart:
the true names (which blocks there are), the width of the prompt in ``attn2.to_k``, the widths of
the text encoders, and 4-D projections (SD1) against 2-D ones. What these leave open stays open:
an architecture of two candidates is written ``sd1|sd2``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from lorafind.formats.names import clip, unet
from lorafind.formats.names.table import Entry, Shape

#: Architectures that have tables, in the order in which candidates are written.
KNOWN = tuple(unet.UNETS)

#: Text encoder → the architectures that have it.
ENCODERS = {
    "te1": frozenset({"sd1", "sdxl"}),
    "te": frozenset({"sd2"}),
    "te2": frozenset({"sdxl", "sdxl-refiner"}),
}
#: (prefix, encoder found) → architectures: writers number encoders only where there are several.
NUMBERED = {
    ("te", "te1"): frozenset({"sd1"}),
    ("te", "te2"): frozenset({"sdxl-refiner"}),
    ("te2", "te2"): frozenset({"sdxl"}),
}

#: Of the modules whose names a table knows, the share whose shapes may differ (a widened conv_in).
TOLERANCE = 0.05
#: Of the U-Net's modules, the share that a table must know.
COVERED = 0.9

#: Last words of the layers that make queries, alone or with others: nearly every adapter has them.
QUERIES = ("to_q", "q_proj", "_q", "query", "qkv", "c_attn", "q_lin", "query_key_value", "wq")


@dataclass(frozen=True, slots=True)
class Sighting:
    """One module of a file: component and flattened name as written, kind as in table.KINDS."""

    component: str
    flat: str
    shape: Shape
    dims: int = 0
    kind: str = "weight"


@dataclass(frozen=True)
class Detected:
    """architecture, and per sighting the entry that it is (None: no table knows it)."""

    architecture: str
    entries: list[Entry | None]
    notes: tuple[str, ...] = ()

    @property
    def known(self) -> bool:
        """True where the architecture has a table."""
        return not self.architecture.startswith("other:")


def detect(sightings: list[Sighting], allowed: frozenset[str] | None = None) -> Detected:
    """The architecture and the entries. allowed: what the spelling leaves possible."""
    entries: list[Entry | None] = [_encoder(s) for s in sightings]
    main = [i for i, s in enumerate(sightings) if not s.component.startswith("te")]
    main = [i for i in main if entries[i] is None]
    candidates = _unets([sightings[i] for i in main]) if main else None
    encoders = {e.owner for e in entries if e is not None}
    strangers = any(
        e is None and s.component.startswith("te") for e, s in zip(entries, sightings, strict=True)
    )
    if candidates is None and not main and encoders and not strangers:
        candidates = list(KNOWN)
    if not candidates:
        return Detected(layout_name(sightings), entries)
    candidates, notes = _narrow(candidates, sightings, entries, allowed)
    if not candidates:
        return Detected(layout_name(sightings), entries)
    for i in main:
        entries[i] = unet.index().get(sightings[i].flat).get(candidates[0])
    return Detected("|".join(a for a in KNOWN if a in candidates), entries, notes)


def _encoder(s: Sighting) -> Entry | None:
    """The layer of a text encoder that a sighting is."""
    if s.component not in ("te", "te1", "te2", "text", "model"):
        return None
    return next((e for e in clip.index().get(s.flat).values() if e.fits(s.shape, s.kind)), None)


def _unets(sightings: list[Sighting]) -> list[str]:
    """The U-Nets that the modules fit best, the empty list where none fits."""
    index = unet.index()
    fits: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for s in sightings:
        for owner, entry in index.get(s.flat).items():
            named[owner] += 1
            fits[owner] += entry.fits(s.shape, s.kind)
    best = max(fits.values(), default=0)
    return [
        owner
        for owner, count in fits.items()
        if count == best
        and count >= (1 - TOLERANCE) * named[owner]
        and named[owner] >= COVERED * len(sightings)
    ]


def _narrow(
    candidates: list[str],
    sightings: list[Sighting],
    entries: list[Entry | None],
    allowed: frozenset[str] | None,
) -> tuple[list[str], tuple[str, ...]]:
    notes = []
    evidence = [(ENCODERS[e.owner], e.owner) for e in entries if e is not None]
    evidence += [
        (NUMBERED[s.component, e.owner], e.owner)
        for s, e in zip(sightings, entries, strict=True)
        if e is not None and (s.component, e.owner) in NUMBERED
    ]
    for possible, owner in dict.fromkeys(evidence):
        left = [a for a in candidates if a in possible]
        if left:
            candidates = left
        elif all(s.component.startswith("te") for s in sightings):
            return [], ()
        else:
            notes.append(f"the text encoder {owner} is not that of {'|'.join(candidates)}")
    if allowed is not None:
        candidates = [a for a in candidates if a in allowed] or candidates
    dims = {s.dims for s in sightings if s.flat.endswith(("_proj_in", "_proj_out")) and s.dims}
    if len(candidates) > 1 and dims:
        conv = 4 in dims
        left = [a for a in candidates if unet.UNETS[a].conv_projection == conv]
        candidates = left or candidates
    return candidates, tuple(notes)


def layout_name(sightings: list[Sighting]) -> str:
    """``other:<8 hex>`` for a model without a table.

    SHA-256 over the sorted (flattened name, o, n) of the layers that make queries: an adapter of
    the attention alone then meets the full one on the same model. Where there are none, over all.
    The text encoders count only where there is nothing else.
    """
    weights = [s for s in sightings if s.kind == "weight"] or sightings
    main = [s for s in weights if not s.component.startswith("te")] or weights
    queries = [s for s in main if s.flat.lower().endswith(QUERIES)] or main
    rows = sorted({(s.flat, *s.shape) for s in queries})
    return "other:" + hashlib.sha256(repr(rows).encode()).hexdigest()[:8]
