"""How near Σ w·ΔW is to a target in style, measured on the sum itself through its sketch.

Style gives every module one vote, so that the style of a sum is not the sum of the styles: a linear
model can choose candidates, but what the merged file will be near to must be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lorafind.bases.basis import Basis
from lorafind.bases.stored import embed
from lorafind.formats import groups as group_bits
from lorafind.index.rows import Module
from lorafind.index.store import Store, layout_digest
from lorafind.mix.total import Sum, Term, total
from lorafind.signatures.features import signature
from lorafind.signatures.sketch import Sketcher

#: Bytes of factors that wait before they are sketched together.
_BATCH = 64 * 2**20


@dataclass(frozen=True)
class Goal:
    """What is to be approached: p_g of the target (1 × width), its groups, whether it was
    fitted."""

    store: Store
    basis: Basis
    parts: np.ndarray
    groups: frozenset[str]
    seen: bool

    def vector(self, groups: Sequence[str]) -> np.ndarray:
        """The target over some groups."""
        return self.basis.vectors(self.parts, groups, np.array([self.seen]))[0]


@dataclass(frozen=True)
class Measured:
    """score: with the sum treated as its terms are; fresh: as a file that the basis has never seen;
    norm: ‖Σ w·ΔW‖."""

    score: float
    fresh: float
    norm: float


def measure(goal: Goal, terms: Sequence[Term], seen: bool) -> Measured:
    """Scores and norm of Σ w·ΔW. seen: every term was fitted, so that the sum carries their noise.

    The components of a basis have seen the noise of the LoRAs they were fitted to, and weigh their
    coordinates by how much of each component's variance is common to LoRAs (``fitted``); those of
    new ones, whose noise falls outside, by ``fresh``. A sum of fitted LoRAs carries their noise, so
    that ``fitted`` is right for it; its file is nevertheless new to whoever scores it later.

    Scores of −1 where nothing of the sum can be compared with the target.
    """
    sketcher = Sketcher(torch.device("cpu"))
    waiting: list[Sum] = []
    size = 0
    shapes: dict[str, tuple[int, int]] = {}
    for one in total(terms):
        shapes[one.place.name] = one.delta.shape
        waiting.append(one)
        size += 8 * (one.b.numel() + one.a.numel())
        if size > _BATCH:
            sketcher.add([(w.place, w.delta) for w in waiting])
            waiting, size = [], 0
    sketcher.add([(w.place, w.delta) for w in waiting])
    made = signature(sketcher)
    kept = sorted(
        (p for p, norm in zip(made.places, made.norms, strict=True) if norm > 0),
        key=lambda p: p.name,
    )
    modules = [Module(p.name, p.group, *shapes[p.name], p.vector, p.late) for p in kept]
    layout = np.array([_layout(goal, terms, modules)])
    # As the index would keep it.
    styles = {
        group: np.rint(style / (np.abs(style).max() / 127)).astype(np.int8)[None]
        for group, style in made.style.items()
    }
    records, parts = embed(goal.basis, styles, layout)
    have = frozenset(group_bits.names(int(records["groups"][0])))
    common = sorted(goal.groups & have)
    if not common:
        return Measured(-1.0, -1.0, made.norm)
    target = goal.vector(common)
    score, fresh = (
        float(goal.basis.scores(goal.basis.vectors(parts, common, np.array([one])), target)[0])
        for one in (seen, False)
    )
    return Measured(score, fresh, made.norm)


def weighted(terms: Sequence[Term], weights: np.ndarray) -> list[Term]:
    """The same terms with other weights."""
    return [replace(t, weight=float(w)) for t, w in zip(terms, weights, strict=True)]


def _layout(goal: Goal, terms: Sequence[Term], modules: list[Module]) -> int:
    """The id of the layout of the sum, −1 where the index has none like it."""
    named = dict.fromkeys([goal.basis.architecture, *(t.adapter.plan.architecture for t in terms)])
    digests = [layout_digest(architecture, modules) for architecture in named]
    row = goal.store.conn.execute(
        f"SELECT id FROM layouts WHERE digest IN ({', '.join('?' * len(digests))})", digests
    ).fetchone()
    return int(row[0]) if row else -1
