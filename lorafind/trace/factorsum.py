"""Factor sums: B = Σ b_k·B_k and A = Σ a_k·A_k, as kohya's ``merge_lora.py`` makes them.

ΔW then holds a_k·b_k·ΔW_k and cross terms B_j·A_k that are in no parent: a sum of ΔW does not
explain it, and a look at the factors as they are stored does. The ratio r that the user gave stands
in both factors, so that ΔW_k enters with r·|r|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafind.formats.adapter import Adapter
from lorafind.formats.delta import ROUNDING, LowRank, Rounding
from lorafind.relations.core import precision

ALLOWED = 2.25
FLOOR = 1e-10
#: Numbers per unknown.
FREEDOM = 50


@dataclass(frozen=True)
class Ratio:
    """One parent: the ratio r (sign of a·b, √|a·b|) and its standard error."""

    at: int
    ratio: float
    sd: float


@dataclass
class _Grams:
    """tt, h, gram of one of the two factors over all modules; error: expected ‖rounding‖² of T's
    factor and of the parents'; numbers in T's."""

    tt: float
    h: np.ndarray
    gram: np.ndarray
    t_error: float
    p_error: np.ndarray
    numbers: int = 0

    def solve(self, keep: list[int]) -> tuple[np.ndarray, bool, np.ndarray]:
        """(coefficients, whether rounding explains what is left, their standard errors)."""
        g, h = self.gram[np.ix_(keep, keep)], self.h[keep]
        size = np.sqrt(np.diagonal(g))
        inverse = np.linalg.pinv(g / np.outer(size, size), rcond=1e-13, hermitian=True)
        c = inverse @ (h / size) / size
        rest = max(0.0, self.tt - 2 * c @ h + c @ g @ c)
        allowed = ALLOWED * (self.t_error + float(c**2 @ self.p_error[keep])) + FLOOR * self.tt
        free = max(1, self.numbers - len(keep))
        sd = np.sqrt(np.maximum(np.diagonal(inverse), 0) * rest / free) / size
        return c, rest <= allowed and self.numbers >= FREEDOM * len(keep), sd


def factor_sum(target: Adapter, candidates: Sequence[Adapter], most: int = 8) -> list[Ratio]:
    """The candidates whose factors add up to T's, empty where they do not.

    Only candidates with T's modules and ranks in all of T's low-rank modules take part.
    """
    plans = {p.name: p for p in target.plan.modules if not p.parameters}
    fitting = []
    for at, adapter in enumerate(candidates):
        theirs = {p.name: p for p in adapter.plan.modules}
        if all(
            n in theirs and theirs[n].shape == p.shape and theirs[n].rank == p.rank
            for n, p in plans.items()
        ):
            fitting.append(at)
    if len(fitting) < 2 or any(p.family != "lora" for p in plans.values()):
        return []
    sides = _grams(target, [candidates[at] for at in fitting])
    if sides is None:
        return []
    up, down = sides
    chosen: list[int] = []
    rest = list(range(len(fitting)))
    # B begins at zero, so that those of strangers are nearly orthogonal: it leads the pursuit.
    while rest and len(chosen) < most + 4:
        c = up.solve(chosen)[0] if chosen else np.empty(0)
        score = up.h[rest] - up.gram[np.ix_(rest, chosen)] @ c
        score = score**2 / np.diagonal(up.gram)[rest]
        chosen.append(rest.pop(int(score.argmax())))
        if up.solve(chosen)[1] and down.solve(chosen)[1]:
            break
    else:
        return []
    for k in sorted(chosen, key=lambda k: abs(up.h[k])):
        fewer = [j for j in chosen if j != k]
        if fewer and up.solve(fewer)[1] and down.solve(fewer)[1]:
            chosen = fewer
    if len(chosen) < 2:
        return []
    (b, _, b_sd), (a, _, a_sd) = up.solve(chosen), down.solve(chosen)
    product = a * b
    ratio = np.sign(product) * np.sqrt(np.abs(product))
    sd = np.abs(ratio) / 2 * np.hypot(b_sd / np.abs(b), a_sd / np.abs(a))
    found = [
        Ratio(fitting[k], float(r), float(s)) for k, r, s in zip(chosen, ratio, sd, strict=True)
    ]
    return sorted(found, key=lambda r: -abs(r.ratio))


def _grams(target: Adapter, parents: Sequence[Adapter]) -> tuple[_Grams, _Grams] | None:
    """Of B (with its scale) and of A, module after module."""
    n = len(parents)
    both = [_Grams(0.0, np.zeros(n), np.zeros((n, n)), 0.0, np.zeros(n)) for _ in range(2)]
    adapters = [target, *parents]
    for plan in target.plan.modules:
        if plan.parameters:
            continue
        deltas = [adapter.modules[plan.name] for adapter in adapters]
        if any(type(d) is not LowRank or d.mid is not None for d in deltas):
            return None
        rounding = [
            ROUNDING[precision(d, a.effective_dtype)] for d, a in zip(deltas, adapters, strict=True)
        ]
        pairs = [d.factors() for d in deltas if isinstance(d, LowRank)]
        for side, grams in enumerate(both):
            stack = torch.stack([pair[side].flatten() for pair in pairs])
            gram = (stack @ stack.T).numpy()
            scales = [d.scale if side == 0 else 1.0 for d in deltas]
            errors = [_error(row, r, s) for row, r, s in zip(stack, rounding, scales, strict=True)]
            grams.tt += gram[0, 0]
            grams.h += gram[0, 1:]
            grams.gram += gram[1:, 1:]
            grams.t_error += errors[0]
            grams.p_error += errors[1:]
            grams.numbers += stack.shape[1]
    return both[0], both[1]


def _error(row: torch.Tensor, rounding: Rounding, scale: float) -> float:
    if not scale:
        return 0.0
    return float(rounding.variance(row / scale).sum()) * scale * scale
