"""From exact numbers to a verdict: which LoRAs a target was made of, with what weights.

Two proofs are accepted, and a large coefficient or a high cosine is none: trainings of one style,
epochs of one run and files from one start have those without being parents.

``sum``: Σ c_k·P_k agrees with T, where T cannot have lost anything, down to the rounding of the
files. Thousands of numbers then agree for a handful of coefficients.
``part``: the others of its sum may be missing: P_k lies in T's row and column spaces to rounding,
T has more rank than it, and taking it off lowers T's rank by all of P_k's
(:meth:`lorafind.trace.spaces.Space.wedderburn`). That also gives its coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lorafind.trace.numbers import Table

#: Squared residual over the expected squared rounding error, as in proofs of copies.
ALLOWED = 2.25
#: Share of ‖T‖² that arithmetic in single precision may leave.
FLOOR = 1e-10
#: Rounding of more than this share of ‖T‖ proves nothing.
TOTAL = 0.01
#: Numbers of T per unknown that a sum must explain.
FREEDOM = 50
#: What lies outside of T's spaces, over the expected rounding.
BEYOND = 4.0
#: Deviation from Wedderburn's identity: where containment speaks too, and where it cannot.
DEVIATION, DEVIATION_ALONE = 0.1, 0.05
#: Independent numbers that the proof of a part rests on, and its least share of ‖P‖².
CHECKS, SHARE = 50, 0.3
#: Share of ‖P‖² outside of T's spaces from which on a module is without P.
ABSENT = 0.5
#: Relative spread of the weights of modules from which on they are called block weights.
BLOCKS = 0.02


@dataclass(frozen=True)
class Weight:
    """One parent of a verdict. at: its column; proof: ``sum`` or ``part``; sd: standard error of
    the weight; low, high: the weights over modules where they differ (block weights), else equal to
    the weight; explained: the share of ‖T‖² that only it explains."""

    at: int
    proof: str
    weight: float
    sd: float
    low: float
    high: float
    explained: float


@dataclass(frozen=True)
class Verdict:
    """weights: of the proved parents, the largest contribution first. explained, left: shares of
    ‖T‖²; lost: ‖what the sum had outside of T's rank‖² over ‖sum‖² (resized). complete: nothing
    but rounding is left; rounding: the share of ‖T‖² up to which that is said. children: columns
    that T itself is an ingredient of, as far as seen."""

    weights: list[Weight] = field(default_factory=list)
    explained: float = 0.0
    left: float = 1.0
    lost: float = 0.0
    complete: bool = False
    rounding: float = 0.0
    children: list[int] = field(default_factory=list)


def coefficients(tangent: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Least squares in T's tangent space; of parts that depend on one another the smallest."""
    size = np.sqrt(np.maximum(np.diagonal(tangent, axis1=-2, axis2=-1), 1e-300))
    scaled = tangent / size[..., :, None] / size[..., None, :]
    return (np.linalg.pinv(scaled, rcond=1e-12, hermitian=True) @ (h / size)[..., None])[
        ..., 0
    ] / size


def spread(t: Table, c: np.ndarray) -> np.ndarray:
    """Standard errors of coefficients that are the same in all modules (White 1980, by module)."""
    scores = t.h - np.einsum("mij,j->mi", t.tangent, c)
    inverse = np.linalg.pinv(t.tangent.sum(0), rcond=1e-12, hermitian=True)
    return np.sqrt(np.maximum(np.diagonal(inverse @ (scores.T @ scores) @ inverse), 0))


@dataclass(frozen=True)
class _Sum:
    """A sum with coefficients M × K. residual: ‖T − Σ‖² in the tangent space, over all modules;
    allowed: what rounding explains; lost: outside of it. holds: within what is allowed in all
    modules together and in every component of the model, as a weak LoRA of the text encoder must
    not vanish in the rounding of a strong one of the U-Net."""

    c: np.ndarray
    residual: float
    allowed: float
    lost: float
    holds: bool


def _sum(t: Table, blocks: bool) -> _Sum:
    if blocks:
        c = coefficients(t.tangent, t.h)
    else:
        c = np.broadcast_to(coefficients(t.tangent.sum(0), t.h.sum(0)), t.h.shape)
    rest = t.tt - 2 * (c * t.h).sum(1) + np.einsum("mi,mij,mj->m", c, t.tangent, c)
    lost = np.einsum("mi,mij,mj->m", c, t.lost, c)
    theirs = (c**2 * t.p_error).sum(1)

    def budget(part: np.ndarray) -> tuple[float, float]:
        """(residual, what is allowed) of some modules."""
        own, total = t.t_error[part].sum(), t.tt[part].sum()
        within = 4 * own / total * lost[part].sum() if total else 0.0
        allowed = ALLOWED * (own + theirs[part].sum() + within) + FLOOR * total
        return max(0.0, float(rest[part].sum())), float(allowed)

    residual, allowed = budget(np.ones(len(rest), bool))
    component = np.array([name.partition("/")[0] for name in t.names])
    each = [budget(component == one) for one in np.unique(component)]
    holds = all(left <= most for left, most in [(residual, allowed), *each])
    return _Sum(c, residual, allowed, max(0.0, float(lost.sum())), holds)


def _free(t: Table, blocks: bool) -> bool:
    """True where T has many more numbers than the sum has unknowns."""
    sides = t.ranks * np.maximum(1, t.numbers / t.limits + t.limits - t.ranks)
    unknowns = t.h.shape[1] * (len(t.names) if blocks else 1)
    return bool(sides.sum() >= FREEDOM * unknowns)


def shares(t: Table) -> tuple[np.ndarray, np.ndarray]:
    """(weight, share of ‖T‖² that goes without it) of each column in the best sum of all, K and K.

    No proof of anything: least squares in T's tangent space with one weight each.
    """
    tangent, h = t.tangent.sum(0), t.h.sum(0)
    c = coefficients(tangent, h)
    count = len(c)
    without = []
    for k in range(count):
        rest = [j for j in range(count) if j != k]
        few = coefficients(tangent[np.ix_(rest, rest)], h[rest])
        without.append(float(c @ h - few @ h[rest]))
    return c, np.array(without) / float(t.tt.sum())


def decide(t: Table) -> Verdict:
    """The verdict over candidates in the order of the pursuit; what is no parent is left out."""
    total = float(t.tt.sum())
    if not t.h.shape[1] or not total or t.t_error.sum() > TOTAL**2 * total:
        return Verdict()
    # The first that are enough: a merge that was taken first stands for what it was made of.
    for blocks in (False, True):
        for count in range(1, t.h.shape[1] + 1):
            few = t.only(range(count))
            found = _sum(few, blocks)
            if found.holds and found.allowed <= (3 * TOTAL) ** 2 * total and _free(few, blocks):
                return _complete(few, blocks)
    return _parts(t)


def _complete(t: Table, blocks: bool) -> Verdict:
    """The fewest LoRAs that still explain everything."""
    keep = list(range(t.h.shape[1]))
    while len(keep) > 1:
        small = t.only(keep)
        whole = _sum(small, blocks)
        power = (whole.c**2 * np.diagonal(small.tangent, axis1=1, axis2=2)).sum(0)
        for k in np.argsort(power):
            rest = [p for i, p in enumerate(keep) if i != k]
            if _sum(t.only(rest), blocks).holds:
                keep = rest
                break
        else:
            break
    small = t.only(keep)
    found = _sum(small, blocks)
    total = float(t.tt.sum())
    children = _children(small, found)
    if children:
        return Verdict(children=[keep[k] for k in children])
    sd = np.zeros(len(keep)) if blocks else spread(small, found.c[0])
    pp = np.diagonal(small.gram, axis1=1, axis2=2)
    rows = []
    for k, at in enumerate(keep):
        rest = [p for p in keep if p != at]
        without = _sum(t.only(rest), blocks).residual if rest else total
        has = pp[:, k] > 0
        used = found.c[has, k]
        weight = float(np.average(used, weights=pp[has, k]))
        low, high = (float(used.min()), float(used.max())) if blocks else (weight, weight)
        share = (without - found.residual) / total
        rows.append(Weight(at, "sum", weight, float(sd[k]), low, high, share))
    rows.sort(key=lambda w: -w.explained)
    left = found.residual / total
    size = found.lost + total
    return Verdict(rows, 1 - left, left, found.lost / size, True, found.allowed / total)


def _children(t: Table, found: _Sum) -> list[int]:
    """Those that make the sum true the other way round: M = ½·T + ½·Q is T = 2·M − Q.

    Nothing of the sum is lost, and yet something of an addend lies outside of T's spaces. Where T's
    spaces are everything, only the signs speak: with a negative weight the direction stays open,
    and nothing is claimed.
    """
    if t.h.shape[1] < 2:
        return []
    own = (found.c**2 * np.diagonal(t.lost, axis1=1, axis2=2)).sum(0)
    bound = 100 * found.allowed
    if found.lost <= bound and own.max() > bound:
        return [int(own.argmax())]
    seen = t.ranks < t.limits
    if not seen.any() and found.c.mean(0).min() < 0:
        worst = (found.c**2 * np.diagonal(t.gram, axis1=1, axis2=2)).sum(0)
        return [int(worst.argmax())]
    return []


def _parts(t: Table) -> Verdict:
    """Parents that are proved one by one."""
    total = float(t.tt.sum())
    rows: list[Weight] = []
    c = np.zeros_like(t.h)
    for k in range(t.h.shape[1]):
        found = _part(t, k)
        if found is None:
            continue
        weight, sd, passed = found
        c[:, k] = np.where(passed, t.weight[:, k], weight)
        used = t.weight[passed, k]
        # Unproved is not absent: a weight of 0 is said only where nothing of P is in T's spaces.
        pp = np.diagonal(t.gram, axis1=1, axis2=2)[:, k]
        off = (t.tt > 0) & (pp > 0) & (t.beyond[:, k] > ABSENT * pp)
        c[off, k] = 0.0
        varied = bool(np.std(used) > BLOCKS * abs(weight) or off.any())
        low, high = (
            (min(float(used.min()), 0.0 if off.any() else np.inf), float(used.max()))
            if varied
            else (weight, weight)
        )
        if not varied:
            c[:, k] = weight
        rows.append(Weight(k, "part", weight, sd, low, high, 0.0))
    if not rows:
        return Verdict()

    def rest(c: np.ndarray) -> float:
        return float(
            (t.tt - 2 * (c * t.h).sum(1) + np.einsum("mi,mij,mj->m", c, t.gram, c)).sum() / total
        )

    left = rest(c)
    told = []
    for row in rows:
        less = c.copy()
        less[:, row.at] = 0.0
        told.append(
            Weight(row.at, row.proof, row.weight, row.sd, row.low, row.high, rest(less) - left)
        )
    return Verdict(sorted(told, key=lambda w: -w.explained), 1 - left, left)


def _part(t: Table, k: int) -> tuple[float, float, np.ndarray] | None:
    """(weight, standard error, modules that prove it), None without proof."""
    pp = np.diagonal(t.gram, axis1=1, axis2=2)[:, k]
    both = (pp > 0) & (t.tt > 0)
    if not both.any():
        return None
    safe = np.where(both, pp, 1.0)
    noise = t.t_error / np.where(both, t.tt, 1.0) + t.p_error[:, k] / safe
    contained = t.beyond[:, k] <= (BEYOND**2 * noise + FLOOR) * safe
    wide = 2 * t.ranks <= t.limits
    limit = np.where(wide, DEVIATION, DEVIATION_ALONE)
    more = t.ranks > t.p_ranks[:, k]
    passed = both & contained & more & (t.deviation[:, k] <= limit)
    outside = np.where(wide, t.numbers / t.limits + t.limits - 2 * t.ranks, 0)
    checks = t.checks[:, k] ** 2 - 1 + t.checks[:, k] * outside
    if checks[passed].sum() < CHECKS or pp[passed].sum() < SHARE * pp[both].sum():
        return None
    # A small deviation tells a good estimate; all modules are off by at least their rounding.
    trust = pp[passed] / (t.deviation[passed, k] ** 2 + noise[passed])
    values = t.weight[passed, k]
    weight = float(np.average(values, weights=trust))
    share = trust / trust.sum()
    # What rounding leaves in T⁺ has one sign in all modules and grows with the deviation's square.
    lean = abs(weight) * float((share * t.deviation[passed, k] ** 2).sum())
    sd = float(np.hypot(np.sqrt((share**2 * (values - weight) ** 2).sum()), lean))
    return weight, sd, passed
