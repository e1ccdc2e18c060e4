"""Exact numbers of a target and some LoRAs, module by module, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorafind.formats.adapter import Adapter
from lorafind.formats.delta import ROUNDING
from lorafind.relations.core import precision
from lorafind.trace.reading import Target
from lorafind.trace.spaces import Part, Space, inner

Tick = Callable[[], None]


@dataclass
class Table:
    """What a fit needs of a target T and K LoRAs P_k over M modules of T.

    tt: ‖T_m‖²; h: ⟨P_k, T⟩, M × K; gram: ⟨P_j, P_k⟩, lost: ⟨P_j⊥, P_k⊥⟩ of what lies outside of
    T's tangent space, M × K × K. beyond: ‖P − UUᵀPVVᵀ‖². t_error, p_error: expected ‖rounding
    error‖². weight, deviation, checks: of Wedderburn's reduction. ranks and limits: of T, min(o,
    n); p_ranks: M × K. numbers: o·n. A module that P_k lacks counts as zero.
    """

    names: list[str]
    tt: np.ndarray
    h: np.ndarray
    gram: np.ndarray
    lost: np.ndarray
    beyond: np.ndarray
    t_error: np.ndarray
    p_error: np.ndarray
    weight: np.ndarray
    deviation: np.ndarray
    checks: np.ndarray
    ranks: np.ndarray
    limits: np.ndarray
    p_ranks: np.ndarray
    numbers: np.ndarray

    @property
    def tangent(self) -> np.ndarray:
        """⟨P_j, P_k⟩ within T's tangent space."""
        return self.gram - self.lost

    def only(self, keep: Sequence[int]) -> Table:
        """The same of some of the LoRAs."""
        at = list(keep)
        both = np.ix_(range(len(self.names)), at, at)
        return Table(
            self.names,
            self.tt,
            self.h[:, at],
            self.gram[both],
            self.lost[both],
            self.beyond[:, at],
            self.t_error,
            self.p_error[:, at],
            self.weight[:, at],
            self.deviation[:, at],
            self.checks[:, at],
            self.ranks,
            self.limits,
            self.p_ranks[:, at],
            self.numbers,
        )


def rounding_error(adapter: Adapter, name: str) -> float:
    """The expected ‖error‖² of one module from the rounding of its stored numbers."""
    delta = adapter.modules[name]
    return delta.squared_rounding(ROUNDING[precision(delta, adapter.effective_dtype)])


def measure(target: Adapter, parents: Sequence[Adapter]) -> Table:
    """All numbers of :class:`Table`; one module of all is in memory at a time."""
    goal = Target(target)
    shapes = goal.shapes
    count, k = len(shapes), len(parents)
    t = Table(
        list(shapes),
        np.zeros(count),
        np.zeros((count, k)),
        np.zeros((count, k, k)),
        np.zeros((count, k, k)),
        np.zeros((count, k)),
        np.zeros(count),
        np.zeros((count, k)),
        np.zeros((count, k)),
        np.full((count, k), np.inf),
        np.zeros((count, k), int),
        np.zeros(count, int),
        np.zeros(count, int),
        np.zeros((count, k), int),
        np.zeros(count),
    )
    theirs = [{p.name: p.shape for p in a.plan.modules if not p.parameters} for a in parents]
    for m, (name, shape, part, space) in enumerate(goal):
        t.tt[m], t.t_error[m] = inner(part, part), rounding_error(target, name)
        t.ranks[m], t.limits[m], t.numbers[m] = space.rank, space.limit, shape[0] * shape[1]
        parts: list[tuple[int, Part, Part | None]] = []
        for i, parent in enumerate(parents):
            if theirs[i].get(name) != shape:
                continue
            own = Part.of(parent.modules[name])
            seen = Space(own)
            t.p_ranks[m, i], t.p_error[m, i] = seen.rank, rounding_error(parent, name)
            t.h[m, i] = inner(own, part)
            t.beyond[m, i] = space.beyond(own)
            t.weight[m, i], t.deviation[m, i], t.checks[m, i] = space.wedderburn(seen)
            parts.append((i, own, space.outside(own)))
            for j, other, past in parts:
                t.gram[m, i, j] = t.gram[m, j, i] = inner(own, other)
                rest = parts[-1][2]
                if rest is not None and past is not None:
                    t.lost[m, i, j] = t.lost[m, j, i] = inner(rest, past)
    return t


def scores(
    target: Target,
    candidates: Sequence[Adapter],
    chosen: Sequence[Adapter],
    c: np.ndarray,
    tick: Tick,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(⟨P_j, R⟩, ‖P_j‖², ‖R‖²), M × J twice and M; R = T − Σ c_k·P_k within T's tangent space.

    c: one per chosen LoRA, or M × K. R stays a product of factors, so that a candidate costs
    one product per side, and those of all candidates are made together.
    """
    found, own = np.zeros((2, len(target.shapes), len(candidates)))
    left = np.zeros(len(target.shapes))
    c = np.broadcast_to(c, (len(target.shapes), len(chosen)))
    plans = [{p.name: p.shape for p in a.plan.modules if not p.parameters} for a in candidates]
    held = [{p.name: p.shape for p in a.plan.modules} for a in chosen]
    bound = [adapter.modules for adapter in candidates]
    for m, (name, shape, part, space) in enumerate(target):
        rest = [part]
        for k, adapter in enumerate(chosen):
            if held[k].get(name) == shape:
                other = Part.of(adapter.modules[name])
                past = space.outside(other)
                rest += [other.times(-c[m, k]), *([past.times(c[m, k])] if past else [])]
        residual = Part.total(rest)
        left[m] = inner(residual, residual)
        who = [j for j, plan in enumerate(plans) if plan.get(name) == shape]
        parts = [Part.of(bound[j][name]) for j in who]
        for j, p in zip(who, parts, strict=True):
            own[m, j] = inner(p, p)
            if p.pair is None:
                found[m, j] = inner(p, residual)
        low = [(j, p.pair) for j, p in zip(who, parts, strict=True) if p.pair is not None]
        if low:
            b = torch.cat([pair[0] for _, pair in low], 1)
            a = torch.cat([pair[1] for _, pair in low])
            if residual.pair is None:
                columns = ((residual.dense().T @ b) * a.T).sum(0)
            else:
                columns = ((residual.pair[0].T @ b) * (residual.pair[1] @ a.T)).sum(0)
            owner = np.repeat([j for j, _ in low], [pair[1].shape[0] for _, pair in low])
            np.add.at(found[m], owner, columns.numpy())
        tick()
    return found, own, left


def column(
    target: Target, new: Adapter, chosen: Sequence[Adapter]
) -> tuple[float, float, np.ndarray]:
    """⟨P, T⟩, and within T's tangent space ‖P‖² and ⟨P, P_k⟩ of those that were chosen before."""
    h = own = 0.0
    others = np.zeros(len(chosen))
    plan = {p.name: p.shape for p in new.plan.modules}
    held = [{p.name: p.shape for p in a.plan.modules} for a in chosen]
    for name, shape, part, space in target:
        if plan.get(name) != shape:
            continue
        mine = Part.of(new.modules[name])
        past = space.outside(mine)
        h += inner(mine, part)
        own += inner(mine, mine) - (inner(past, past) if past else 0.0)
        for k, adapter in enumerate(chosen):
            if held[k].get(name) != shape:
                continue
            other = Part.of(adapter.modules[name])
            rest = space.outside(other)
            both = inner(past, rest) if past is not None and rest is not None else 0.0
            others[k] += inner(mine, other) - both
    return h, own, others
