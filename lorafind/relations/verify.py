"""The proof of what one adapter is to another, from their ΔW alone.

Every test is on residuals of single modules in float64, against the rounding that the stored
dtypes can have caused; a cosine of 1 − ε would hide a residual of √(2ε). Modules are read one at a
time and only a few numbers of each are kept. As soon as neither adapter can hold the other, the
rest of the modules give inner products only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace

from lorafind.formats.adapter import Adapter, Place
from lorafind.formats.delta import ROUNDING, Delta
from lorafind.relations.bits import explained, same_tensors
from lorafind.relations.core import Match, Overlap, measure, overlap, precision, squared_norm
from lorafind.relations.facts import (
    Extras,
    at_least_as_fine,
    coarse,
    differences,
    dropped_words,
    extras_words,
    spread,
)
from lorafind.relations.grades import GRADES, Relation, Side, Step, weakest

#: Squared residual that is always allowed, in units of ‖X_m‖²: noise of single precision, in which
#: an SVD at full rank comes back with 0.3 to 1.3e-6 of ‖X_m‖.
FLOOR = 1e-11
#: The same for the energy that a resize loses beyond the best approximation.
RESIZE_FLOOR = 1e-10
#: Rounding may explain at most this part of ‖X‖ in all.
TOTAL = 0.005
#: |cosine| of ``near`` and ``kin``, and the least of both in units of the strangers' sd.
NEAR, NEAR_CHANCE = 0.98, 4.0
KIN, KIN_CHANCE = 0.30, 8.0
#: Numbers beyond the free factors that a proof with free factors must rest on.
FREEDOM = 16
#: More factors by bits than these are block weights, not one factor.
MANY_FACTORS = 8
#: Squared residual, in units of ‖Y_m‖², below which equal bits are equal ΔW.
EXACT = 1e-24
#: An estimated factor is off by no more than this.
FACTOR_NOISE = 2e-4
#: Two factors are one.
SAME_FACTOR = 1e-9


def prove(x: Adapter, y: Adapter, *, same_file: bool = False) -> Relation | None:
    """The strongest relation of x and y that can be proved, or None for strangers.

    same_file: the two files are the same bytes. Adapters whose ΔW is zero everywhere, or that
    have no nonzero module in common, have no relation.
    """
    if same_file:
        return Relation("file", None, dominates=(True, True))
    if same_tensors(x, y):
        differs = {"metadata": ["as stored", "other metadata or order of keys"]}
        return Relation("tensors", None, differs=differs, dominates=(True, True))
    found = Evidence(x, y)
    proofs: dict[Side, Proof] = {}
    extras = Extras(x, y) if any(found.alive.values()) else None
    if extras is not None and not extras.clash:
        if found.alive["x"] and not extras.y_only and (proof := found.judge("x", extras.x_only)):
            proofs["x"] = proof
        if found.alive["y"] and not extras.x_only and (proof := found.judge("y", extras.y_only)):
            proofs["y"] = proof
    if not proofs or extras is None:
        return found.alike(extras)
    dominates: dict[Side, bool] = {
        "x": "x" in proofs and not extras.y_unread and at_least_as_fine(found.view("x")),
        "y": "y" in proofs and not extras.x_unread and at_least_as_fine(found.view("y")),
    }
    order = (
        (-GRADES.index(p.grade), dominates[s], found.finer(s), s == "x", s)
        for s, p in proofs.items()
    )
    side = max(order)[-1]
    proof = proofs[side]
    symmetric = not proof.steps and len(proofs) == 2 and dominates["x"] == dominates["y"]
    differs = differences(x, y, found.active, found.ranks, extras)
    return Relation(
        grade=proof.grade,
        larger=None if symmetric else side,
        steps=proof.steps,
        cosine=found.cosine,
        factor=proof.factor,
        shares=found.shares,
        differs=differs or {"factors": ["as stored", "written in another way"]},
        dominates=(dominates["x"], dominates["y"]),
        margin=proof.margin,
    )


@dataclass(frozen=True)
class Proof:
    """That the smaller adapter follows from the larger one."""

    steps: tuple[Step, ...]
    factor: float
    margin: float

    @property
    def grade(self) -> str:
        """The weakest step's."""
        return weakest(["weights", *(step.grade for step in self.steps)])


@dataclass(frozen=True)
class Fit:
    """How one module passed: its factor, the residual over what is allowed, and by what.

    cast: by bits, and the rounding did lose something.
    """

    factor: float
    margin: float
    by_bits: bool = False
    cast: bool = False
    resized: bool = False


class Evidence:
    """The numbers of all modules, gathered in one pass over two adapters.

    matches: modules of both plans, as long as a proof was possible. x_only, y_only: ‖ΔW_m‖² of
    modules of one plan alone, zeros left out. alive[s]: nothing yet speaks against s as the larger.
    ranks: of the modules of x and of y. fixed: modules of parameters, which no factor or lower rank
    makes of others.
    """

    def __init__(self, x: Adapter, y: Adapter) -> None:
        self.x, self.y = x, y
        self.places: dict[str, Place] = {m.name: m.place for a in (x, y) for m in a.plan.modules}
        ours, theirs = ({m.name: m.shape for m in a.plan.modules} for a in (x, y))
        common = [name for name in ours if theirs.get(name) == ours[name]]
        shared = set(common)
        self.ranks: tuple[set[int], set[int]] = (set(), set())
        one, two = x.modules, y.modules
        self.x_only, self.y_only = (
            {n: norm for n in names - shared if (norm := self._alone(bound[n], side))}
            for side, (names, bound) in enumerate(((ours.keys(), one), (theirs.keys(), two)))
        )
        self.fixed = {m.name for m in x.plan.modules if m.parameters}
        self.alive: dict[Side, bool] = {"x": not self.y_only, "y": not self.x_only}
        self.matches: dict[str, Match] = {}
        self.overlaps: dict[str, Overlap] = {}
        for name in common:
            pair = one[name], two[name]
            for seen, delta in zip(self.ranks, pair, strict=True):
                seen.add(delta.rank)
            if any(self.alive.values()):
                match = self._match(*pair)
                self.matches[name] = match
                self.overlaps[name] = Overlap(match.xx, match.yy, match.xy, match.chance)
            else:
                self.overlaps[name] = overlap(*pair)

    def _alone(self, delta: Delta, side: int) -> float:
        """‖ΔW‖² of a module that one adapter alone has."""
        self.ranks[side].add(delta.rank)
        return squared_norm(delta)

    def _match(self, x: Delta, y: Delta) -> Match:
        match = measure(
            x, y, precision(x, self.x.effective_dtype), precision(y, self.y.effective_dtype)
        )
        # Bits are compared only where rounding alone does not settle the matter.
        if self.alive["x"] and _wants_bits(match):
            match = replace(match, x_bits=explained(x, y, match.y_dtype, _candidates(match)))
        flipped = match.flipped()
        if self.alive["y"] and _wants_bits(flipped):
            match = replace(match, y_bits=explained(y, x, match.x_dtype, _candidates(flipped)))
        self.alive["x"] = self.alive["x"] and _possible(match)
        self.alive["y"] = self.alive["y"] and _possible(match.flipped())
        return match

    def view(self, side: Side) -> dict[str, Match]:
        """The matches with ``side`` as X."""
        if side == "x":
            return self.matches
        return {name: match.flipped() for name, match in self.matches.items()}

    def finer(self, side: Side) -> bool:
        """True where the file of ``side`` has the better effective dtype."""
        ours, theirs = (ROUNDING[a.effective_dtype].u for a in (self.x, self.y))
        return ours < theirs if side == "x" else theirs < ours

    @property
    def active(self) -> tuple[set[str], set[str]]:
        """Names of the modules of x and of y whose ΔW is not zero."""
        ours = {name for name, o in self.overlaps.items() if o.xx} | self.x_only.keys()
        theirs = {name for name, o in self.overlaps.items() if o.yy} | self.y_only.keys()
        return ours, theirs

    @property
    def common(self) -> list[Overlap]:
        """Modules that are not zero on either side."""
        return [o for o in self.overlaps.values() if o.xx and o.yy]

    @property
    def cosine(self) -> float:
        """Of ΔW over the common modules; 0 without any."""
        return self._over_norms(math.fsum(o.xy for o in self.common))

    @property
    def chance(self) -> float:
        """The sd of the cosine if the two were strangers that share a factor per module."""
        return self._over_norms(math.sqrt(math.fsum(o.chance for o in self.common)))

    def _over_norms(self, total: float) -> float:
        norms = math.fsum(o.xx for o in self.common), math.fsum(o.yy for o in self.common)
        return total / math.sqrt(norms[0]) / math.sqrt(norms[1]) if norms[0] and norms[1] else 0.0

    @property
    def shares(self) -> tuple[float, float]:
        """Of ‖x‖² and of ‖y‖², the part in common modules."""
        x_all = math.fsum(o.xx for o in self.overlaps.values()) + math.fsum(self.x_only.values())
        y_all = math.fsum(o.yy for o in self.overlaps.values()) + math.fsum(self.y_only.values())
        common = self.common
        return (
            math.fsum(o.xx for o in common) / x_all if x_all else 0.0,
            math.fsum(o.yy for o in common) / y_all if y_all else 0.0,
        )

    def alike(self, extras: Extras | None) -> Relation | None:
        """``near`` or ``kin`` from the exact cosine, None below both."""
        cosine, chance = self.cosine, self.chance
        size = abs(cosine)
        if size >= NEAR and size >= NEAR_CHANCE * chance:
            grade = "near"
        elif size >= KIN and size >= KIN_CHANCE * chance:
            grade = "kin"
        else:
            return None
        return Relation(
            grade=grade,
            larger=None,
            cosine=cosine,
            factor=0.0,
            shares=self.shares,
            differs=differences(self.x, self.y, self.active, self.ranks, extras),
            chance=chance,
        )

    def judge(self, side: Side, extras_gone: list[str]) -> Proof | None:
        """The strongest proof that the other adapter follows from ``side``'s."""
        matches = self.view(side)
        only = self.x_only if side == "x" else self.y_only
        pairs = [m for m in matches.values() if m.xx and m.yy]
        if not pairs:
            return None
        for factors, resize, bits in _hypotheses(pairs):
            fits = _fit(matches, factors, resize, bits, self.fixed)
            if fits is None:
                continue
            dropped = [n for n, m in matches.items() if m.xx and n not in fits] + list(only)
            steps = [
                *self._dtype_steps(side, fits),
                *self._part_steps(side, dropped, extras_gone),
                *_resize_steps(matches, fits),
                *_factor_steps(matches, fits),
            ]
            used = _used(matches, fits)
            return Proof(
                tuple(steps),
                factor=used[0] if len(set(used)) == 1 else 1.0,
                margin=max(fit.margin for fit in fits.values()),
            )
        return None

    def _dtype_steps(self, side: Side, fits: dict[str, Fit]) -> list[Step]:
        larger, smaller = (self.x, self.y) if side == "x" else (self.y, self.x)
        dtype, was = smaller.effective_dtype, larger.effective_dtype
        values = {"from": was, "to": dtype}
        if any(fit.cast for fit in fits.values()):
            return [Step("cast", dtype, values)]
        return [Step("dtype", dtype, values)] if dtype != was else []

    def _part_steps(self, side: Side, dropped: list[str], extras_gone: list[str]) -> list[Step]:
        steps = []
        if dropped:
            active = self.active[0] if side == "x" else self.active[1]
            words = dropped_words(
                [self.places[name] for name in dropped], [self.places[name] for name in active]
            )
            share = self.shares[0] if side == "x" else self.shares[1]
            values = {"modules": len(dropped), "of": len(active), "share": share}
            steps.append(Step("part", words, values))
        if extras_gone:
            steps.append(Step("part", extras_words(extras_gone), {"extras": sorted(extras_gone)}))
        return steps


def _equal(m: Match, c: float) -> float:
    """‖Y − c·X‖² over what rounding allows: at most 1 where Y is c·X."""
    if coarse(m.x_dtype) or coarse(m.y_dtype):
        return math.inf
    allowed = m.noise(c) + FLOOR * c * c * m.xx
    return _ratio(m.from_x(c), allowed)


def _truncated(m: Match, c: float) -> float:
    """‖X − Y/c‖² − Σ_{i>r'} σ_i(X)² over what is allowed: ≤ 1 where Y/c is X at its best rank r'.

    The optimum itself is tested: ⟨X, Y⟩ = ‖Y‖² would hold for any X = Y + Z with Z ⟂ Y.
    """
    if coarse(m.x_dtype) or coarse(m.y_dtype) or not c:
        return math.inf
    allowed = m.noise(c) / (c * c) + RESIZE_FLOOR * m.xx
    return _ratio(m.from_y(1 / c) - m.x_tail, allowed)


def _ratio(residual: float, allowed: float) -> float:
    if residual <= 0:
        return 0.0
    return residual / allowed if allowed else math.inf


def _fitted(m: Match, c: float, resize: bool, bits: bool) -> Fit | None:
    """How Y passes as c·X in one module, None where it does not."""
    if bits and any(abs(c - b) <= SAME_FACTOR * abs(c) for b in m.x_bits):
        return Fit(c, 0.0, by_bits=True, cast=m.from_x(c) > EXACT * m.yy)
    ratio = _equal(m, c)
    if ratio <= 1:
        return Fit(c, math.sqrt(ratio))
    if resize:
        ratio = _truncated(m, c)
        if ratio <= 1:
            return Fit(c, math.sqrt(ratio), resized=m.y_rank < m.x_rank)
    return None


def _own_factors(m: Match) -> list[float]:
    """The factors that a single module suggests."""
    found = list(m.x_bits)
    if m.xy:
        found += [m.xy / m.xx, m.yy / m.xy]
    return found


def _possible(m: Match) -> bool:
    """False where no factor and no lower rank make Y of X in this module."""
    if not m.yy:
        return True
    if not m.xx:
        return _equal(m, 1.0) <= 1
    return any(_fitted(m, c, resize=True, bits=True) for c in _own_factors(m))


def _wants_bits(m: Match) -> bool:
    """True where rounding cannot prove the module, but a comparison of bits might."""
    if not m.xx or ROUNDING[m.x_dtype].u > ROUNDING[m.y_dtype].u:
        return False
    if not m.yy:
        return coarse(m.y_dtype)
    return _equal(m, m.xy / m.xx) > 1 or m.y_error > TOTAL**2 * m.yy


def _candidates(m: Match) -> tuple[float, ...]:
    """Factors to try bit for bit: none, and the round number that the inner product suggests."""
    guess = float(f"{m.xy / m.xx:.2g}")
    return (1.0, guess) if guess not in (0.0, 1.0) else (1.0,)


Factors = Callable[[Match], list[float]]


def _hypotheses(pairs: list[Match]) -> Iterator[tuple[Factors, bool, bool]]:
    """What to try, from the strongest grade to the weakest.

    Each is (factors to try per module, whether ranks may fall, whether bits count).
    c = Σ⟨X_m, Y_m⟩/Σ‖X_m‖² fits the equation Y = c·X; where Y is truncated, ⟨X_m, Y_m⟩/c is what is
    left of ‖X_m‖², and c = Σ‖Y_m‖²/Σ⟨X_m, Y_m⟩.
    """
    xx, yy, xy = (math.fsum(getattr(m, n) for m in pairs) for n in ("xx", "yy", "xy"))
    shrinks = any(m.y_rank < m.x_rank for m in pairs)
    numbers = sum(m.numbers for m in pairs)
    by_bits = {c for m in pairs for c in m.x_bits}
    yield _always(1.0), False, False
    yield _always(1.0), False, True
    if xy and numbers > FREEDOM:
        for c in _rounded(xy / xx):
            yield _always(c), False, False
        for c in sorted(by_bits) if len(by_bits) <= MANY_FACTORS else []:
            yield _always(c), False, True
    if shrinks:
        yield _always(1.0), True, False
        if xy and numbers > FREEDOM:
            for c in _rounded(yy / xy):
                yield _always(c), True, False
    if numbers > FREEDOM + len(pairs):
        yield _own_factors, shrinks, False
        yield _own_factors, shrinks, True


def _rounded(c: float) -> list[float]:
    """c and, before it, the round number that it is up to the noise of rounded weights."""
    short = float(f"{c:.3g}")
    return [short, c] if abs(short - c) <= FACTOR_NOISE * abs(c) else [c]


def _always(c: float) -> Factors:
    return lambda m: [c]


def _fit(
    matches: dict[str, Match], factors: Factors, resize: bool, bits: bool, fixed: Container[str]
) -> dict[str, Fit] | None:
    """Fits of all modules that the smaller adapter has, None where one fails.

    A module that is zero there and not in X is left out: it was dropped, unless rounding explains
    the zero. All modules that rest on rounding must together keep below TOTAL.
    """
    fits: dict[str, Fit] = {}
    error = size = 0.0
    for name, m in matches.items():
        if not m.xx and not m.yy:
            continue
        free = name not in fixed
        choices = factors(m) if m.xx and m.yy and free else [1.0]
        tried = [fit for c in choices if (fit := _fitted(m, c, resize and free, bits))]
        if not tried:
            if m.yy:
                return None
            continue
        best = min(tried, key=lambda fit: (not fit.by_bits, fit.resized, fit.margin))
        fits[name] = best
        size += m.xx
        if not best.by_bits:
            error += m.x_error + m.y_error / best.factor**2
    return fits if error <= TOTAL**2 * size else None


def _resize_steps(matches: dict[str, Match], fits: dict[str, Fit]) -> list[Step]:
    names = [name for name, fit in fits.items() if fit.resized]
    if not names:
        return []
    was, now = (spread(getattr(matches[n], side) for n in names) for side in ("x_rank", "y_rank"))
    kept = math.fsum(matches[n].xx - matches[n].x_tail for n in names)
    values = {
        "from": was,
        "to": now,
        "modules": len(names),
        "kept": kept / math.fsum(matches[n].xx for n in names),
    }
    return [Step("resized", f"resized {was}→{now}", values)]


def _used(matches: dict[str, Match], fits: dict[str, Fit]) -> list[float]:
    """The factors of the modules that are not zero on either side."""
    return [fit.factor for name, fit in fits.items() if matches[name].xx and matches[name].yy]


def _factor_steps(matches: dict[str, Match], fits: dict[str, Fit]) -> list[Step]:
    used = _used(matches, fits)
    low, high = min(used), max(used)
    if low == high == 1.0:
        return []
    if low == high:
        opposite = "the opposite direction, " if low < 0 else ""
        words = f"×{low:.4g} ({opposite}use at ×{1 / low:.4g})"
        return [Step("scaled", words, {"factor": low})]
    turned = ", some reversed" if low < 0 < high else ""
    words = f"modules reweighted ×{low:.3g} to ×{high:.3g}{turned}"
    return [Step("reweighted", words, {"from": low, "to": high, "modules": len(used)})]
