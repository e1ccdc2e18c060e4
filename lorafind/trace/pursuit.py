"""Which LoRAs to measure exactly: matching pursuit over identity sketches.

The sketch of a merge is the merge of the sketches. At each step the residual's sketch names the
LoRAs that may have a part in what is left, those are measured from their files, and the one that
explains most is taken; so parents that lie below the sketch's noise come to light when the stronger
ones are off (orthogonal matching pursuit, Pati et al. 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.formats.adapter import Adapter
from lorafind.index.progress import Progress
from lorafind.signatures.constants import DIMENSIONS
from lorafind.trace.fit import FLOOR, coefficients
from lorafind.trace.numbers import column, rounding_error, scores
from lorafind.trace.reading import Target


@dataclass(frozen=True)
class Effort:
    """shortlist: LoRAs that one step measures; sigmas: how far above the sketch's noise they must
    be, and first: the best of the first step."""

    shortlist: int
    sigmas: float
    first: float


#: For one file, and for each of a whole collection: of 10,000 strangers the nearest is at 3.9.
THOROUGH, SURVEY = Effort(200, 1.5, 1.5), Effort(40, 3.0, 4.5)
#: A LoRA that explains less than this share of what is left in its modules is passed over.
LEAST = 0.01
#: Parents that are looked for; some more are measured, as kin may come before a parent.
PARENTS, STEPS = 8, 12
#: Relative spacing of float16, in which the sketches are kept.
HALF = 2.0**-11
#: A LoRA that brings less than this share of its own ‖·‖² is a copy of those that were taken.
DEPENDENT = 1e-5
#: Candidates whose gain is computed exactly.
FINALISTS = 4

#: Blocks of (ids, identity rows).
Scan = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
Open = Callable[[int], Adapter | None]


@dataclass
class Found:
    """ids and adapters of those that were taken, in this order; listed: the others of the first and
    of the last step. left: the share of ‖T‖² that those taken do not explain; noise: the standard
    deviation of the sketched inner product of what is left with a stranger of unit norm, over ‖T‖;
    sigmas: so many of them a LoRA had to have to be measured.
    """

    ids: list[int] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)
    listed: dict[int, Adapter] = field(default_factory=dict)
    left: float = 1.0
    noise: float = 0.0
    sigmas: float = 0.0


def shortlist(
    residual: np.ndarray, noise: np.ndarray, scan: Scan, skip: set[int], effort: Effort = THOROUGH
) -> list[tuple[float, int]]:
    """(standard deviations of the sketch, LoRA) of those that agree most with the residual's.

    residual: segments × 128, noise: per segment ‖·‖² of what is uncertain in it.
    """
    square = (residual**2).sum(1) + noise
    scored: list[tuple[float, int]] = []
    for ids, rows in scan():
        own = rows["norms"].astype(np.float64)
        d = np.einsum("ns,nsd,sd->n", own, rows["sketch"].astype(np.float64), residual)
        sd = np.sqrt((own**2) @ square / DIMENSIONS)
        z = np.divide(np.abs(d), sd, out=np.zeros_like(d), where=sd > 0)
        scored += [
            (z[k], int(ids[k])) for k in np.flatnonzero(z >= effort.sigmas) if ids[k] not in skip
        ]
        scored = sorted(scored, reverse=True)[: effort.shortlist]
    return scored


def new_share(gram: np.ndarray) -> float:
    """The share of the last one's squared norm that the others do not hold."""
    if len(gram) == 1:
        return 1.0
    across = gram[-1, :-1]
    inside = across @ np.linalg.pinv(gram[:-1, :-1], rcond=1e-12, hermitian=True) @ across
    return float(1 - inside / gram[-1, -1]) if gram[-1, -1] > 0 else 0.0


def sketches(scan: Scan, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """LoRA → its sketch with its norms, segments × 128 float64."""
    found = {}
    for ids, rows in scan():
        for k in np.flatnonzero(np.isin(ids, wanted)):
            row = rows[k]
            found[int(ids[k])] = row["sketch"].astype(np.float64) * row["norms"][:, None]
    return found


def pursue(
    target: Adapter,
    identity: np.ndarray,
    scan: Scan,
    open_lora: Open,
    skip: set[int],
    watch: Progress,
    effort: Effort = THOROUGH,
) -> Found:
    """Take LoRAs until nothing is left, or none explains LEAST of it."""
    found = Found(sigmas=effort.first)
    own = identity["sketch"].astype(np.float64) * identity["norms"].astype(np.float64)[:, None]
    size = float((identity["norms"].astype(np.float64) ** 2).sum())
    held = (identity["norms"] > 0)[:, None]
    gram, h = np.empty((0, 0)), np.empty(0)
    left, residual = size, own
    quantum = HALF**2 * identity["norms"].astype(np.float64) ** 2
    banned = set(skip)
    first: list[tuple[int, Adapter]] = []
    goal = Target(target)
    floor = float("nan")
    for step in range(STEPS):
        listed = shortlist(residual, quantum, scan, banned, effort)
        if step == 0:
            if not listed or listed[0][0] < effort.first:
                break
            found.sigmas = effort.sigmas
            floor = FLOOR * size + sum(rounding_error(target, name) for name in goal.shapes)
        opened = [(k, adapter) for _, k in listed if (adapter := open_lora(k)) is not None]
        if not opened:
            break
        first = first or opened
        found.listed = dict(first + opened)
        watch.stage(f"Measuring {len(opened)} LoRAs", len(goal.shapes), 0)
        c = coefficients(gram, h) if len(h) else h
        each, norms, rest = scores(
            goal, [a for _, a in opened], found.adapters, c, lambda: watch.advance(1, 0)
        )
        score, own_norm = each.sum(0), norms.sum(0)
        drop = np.divide(score**2, own_norm, out=np.zeros_like(score), where=own_norm > 0)
        # A LoRA of the text encoder alone counts by what is left there.
        drop[drop < LEAST * (rest @ (norms > 0))] = 0.0
        if not drop.any():
            break
        # Of the best the exact gain counts: what T has no rank for says nothing.
        gains = []
        for at in [k for k in np.argsort(-drop)[:FINALISTS].tolist() if drop[k]]:
            number, adapter = opened[at]
            one, power, across = column(goal, adapter, found.adapters)
            grown = np.block([[gram, across[:, None]], [across[None], np.array([[power]])]])
            share = new_share(grown)
            if share >= DEPENDENT:
                gains.append((score[at] ** 2 / (share * power), number, adapter, grown, one))
            elif at == int(drop.argmax()):
                banned.add(number)
        if not gains:
            continue
        _, number, adapter, grown, one = max(gains, key=lambda gain: gain[0])
        banned.add(number)
        gram, h = grown, np.append(h, one)
        found.ids.append(number)
        found.adapters.append(adapter)
        c = coefficients(gram, h)
        left = max(0.0, size - float(c @ h))
        # What a merge left out, such as a text encoder, is no residual of it.
        parts = {k: part * held for k, part in sketches(scan, found.ids).items()}
        residual = own - sum(w * parts[k] for w, k in zip(c, found.ids, strict=True))
        quantum = HALF**2 * (
            (own**2).sum(1)
            + sum(w * w * (parts[k] ** 2).sum(1) for w, k in zip(c, found.ids, strict=True))
        )
        if left <= floor:
            break
    square = (residual**2).sum(1) + quantum
    norms = identity["norms"].astype(np.float64) ** 2
    if size:
        found.noise = float(np.sqrt((norms * square).sum() / DIMENSIONS) / size)
        found.left = left / size
    return found
