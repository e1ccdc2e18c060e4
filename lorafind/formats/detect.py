"""Which base model an adapter is for: from names and shapes, never from metadata.

FORMATS of ComfyUI (``model_detection.py``), diffusers and sd-scripts say what tells models apart:
the true names (which blocks there are, and how many), the widths of the layers and of the prompt,
and the text encoders. What these leave open stays open: all that an adapter may be for is named
(:mod:`lorafind.formats.architectures`).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from lorafind.formats import encoders
from lorafind.formats.architectures import joined, ordered
from lorafind.formats.encoders import Encoder
from lorafind.formats.names import unet
from lorafind.formats.names.pattern import Outline, outline
from lorafind.formats.names.table import Entry
from lorafind.formats.names.tables import Table, tables
from lorafind.formats.sighting import Sighting

#: Of the modules whose names a table knows, the share whose shapes may differ (a widened conv_in).
TOLERANCE = 0.05
#: Of the modules of no text encoder, the share that a table must know: what was added to a model
#: (control blocks, an adapter for faces or sound) is trained beside its own layers.
COVERED = 0.5
#: A U-Net that knows this share is not compared with transformers.
CERTAIN = 0.9
#: Runs of fewer blocks say nothing by being complete.
BLOCKS = 4

#: Last words of the layers that make queries, alone or with others: nearly every adapter has them.
QUERIES = ("to_q", "q_proj", "_q", "query", "qkv", "c_attn", "q_lin", "query_key_value", "wq")


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
    entries, found = encoders.find(sightings)
    main = [i for i, s in enumerate(sightings) if entries[i] is None and not s.is_text]
    alone = not main and None not in entries
    if main:
        candidates = _models([sightings[i] for i in main])
    else:
        candidates = ordered([*unet.UNETS, *models()]) if alone else []
    candidates, notes = _by_encoders(candidates, found, alone)
    if allowed is not None:
        candidates = [a for a in candidates if a in allowed] or candidates
    candidates = _by_projections(candidates, sightings)
    if not candidates:
        return Detected(layout_name(sightings), entries)
    for i in main:
        entries[i] = lookup(candidates, sightings[i].flat)
    return Detected(joined(candidates), entries, notes)


def models() -> dict[str, Table]:
    """The tables of the networks that make pictures: all but those of text encoders."""
    return {owner: table for owner, table in tables().items() if not owner.startswith("te_")}


def lookup(candidates: list[str], flat: str) -> Entry | None:
    """The layer of that name in the first candidate that has it."""
    for owner in candidates:
        if owner in unet.UNETS:
            entry = unet.index().get(flat).get(owner)
        else:
            match = tables()[owner].find(outline(flat))
            entry = match.entry if match else None
        if entry is not None:
            return entry
    return None


# ---------------------------------------------------------------------------- names and shapes


@dataclass
class _Score:
    """How well the modules fit a network.

    named: how many names it has; fits: how many of these have the right shape; complete: of how
    many runs of its blocks every one is there.
    """

    named: int = 0
    fits: int = 0
    complete: int = 0

    def count(self, s: Sighting, entry: Entry) -> None:
        """Take in a module whose name the network has."""
        fits = entry.fits(s.shape, s.kind)
        # Parameters tell too little of a layer's shape to be held against a network.
        self.named += fits or s.kind != "parameters"
        self.fits += fits

    def enough(self, total: int, covered: float) -> bool:
        """True where modules, ``total`` in number, can be this network's."""
        return self.fits >= (1 - TOLERANCE) * self.named and self.named >= covered * total


def _models(sightings: list[Sighting]) -> list[str]:
    """The networks that the modules fit best, the empty list where none fits."""
    scores = _unets(sightings)
    if certain := _best(scores, len(sightings), CERTAIN):
        return certain
    scores |= _tables(sightings)
    return _best(scores, len(sightings), COVERED)


def _best(scores: dict[str, _Score], total: int, covered: float) -> list[str]:
    best = max((score.fits for score in scores.values()), default=0)
    left = {
        owner: score
        for owner, score in scores.items()
        if score.fits == best and score.enough(total, covered)
    }
    # A file with every block of one network and some of another's is of the first.
    most = max((score.complete for score in left.values()), default=0)
    return ordered(owner for owner, score in left.items() if score.complete == most)


def _unets(sightings: list[Sighting]) -> dict[str, _Score]:
    index = unet.index()
    scores: dict[str, _Score] = defaultdict(_Score)
    for s in sightings:
        for owner, entry in index.get(s.flat).items():
            scores[owner].count(s, entry)
    return dict(scores)


def _tables(sightings: list[Sighting]) -> dict[str, _Score]:
    named = [(s, outline(s.flat)) for s in sightings]
    counts = Counter(name.text for _, name in named)

    def covers(knows: Callable[[str], bool]) -> bool:
        return sum(n for text, n in counts.items() if knows(text)) >= COVERED * len(named)

    scores = {}
    for owner, table in models().items():
        # Most tables need not be read to say that they know too little.
        if covers(table.may_know) and covers(table.knows):
            score = _score(table, named)
            if score is not None:
                scores[owner] = score
    return scores


def _score(table: Table, named: list[tuple[Sighting, Outline]]) -> _Score | None:
    """The score of one table; None where a module stands in a block that it does not have."""
    score = _Score()
    blocks: dict[str, set[int]] = defaultdict(set)
    for s, name in named:
        match = table.find(name)
        if match is None:
            if table.beyond(name):
                return None
            continue
        score.count(s, match.entry)
        if match.head:
            blocks[match.head].add(match.block)
    score.complete = sum(
        len(seen) == table.depths[head] for head, seen in blocks.items() if len(seen) >= BLOCKS
    )
    return score


# ---------------------------------------------------------------------------- what narrows


def _by_encoders(
    candidates: list[str], found: list[Encoder], alone: bool
) -> tuple[list[str], tuple[str, ...]]:
    """Those that have the text encoders. alone: there is nothing else in the file."""
    notes = []
    for encoder in found:
        left = [a for a in candidates if encoder.may_belong(a)]
        if left or alone:
            candidates = left
        elif candidates:
            names = " or ".join(sorted(encoder.owners))
            notes.append(f"the text encoder {names} is not that of {joined(candidates)}")
    return candidates, tuple(notes)


def _by_projections(candidates: list[str], sightings: list[Sighting]) -> list[str]:
    """SD1 projects by convolutions, the later U-Nets by matrices."""
    if len(candidates) < 2 or not set(candidates) <= unet.UNETS.keys():
        return candidates
    dims = {s.dims for s in sightings if s.flat.endswith(("_proj_in", "_proj_out")) and s.dims}
    if not dims:
        return candidates
    left = [a for a in candidates if unet.UNETS[a].conv_projection == (4 in dims)]
    return left or candidates


# ---------------------------------------------------------------------------- unknown models


def layout_name(sightings: list[Sighting]) -> str:
    """``other:<8 hex>`` for a model without a table.

    SHA-256 over the sorted (flattened name, o, n) of the layers that make queries: an adapter of
    the attention alone then meets the full one on the same model. Where there are none, over all.
    The text encoders count only where there is nothing else.
    """
    weights = [s for s in sightings if s.kind == "weight"] or sightings
    main = [s for s in weights if not s.is_text] or weights
    queries = [s for s in main if s.flat.lower().endswith(QUERIES)] or main
    rows = sorted({(s.flat, *s.shape) for s in queries})
    return "other:" + hashlib.sha256(repr(rows).encode()).hexdigest()[:8]
