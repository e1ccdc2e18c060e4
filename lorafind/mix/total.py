"""Σ w·ΔW of several adapters, module by module, through the factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafind.formats.adapter import Adapter, Place
from lorafind.formats.delta import Delta, LowRank
from lorafind.index.problem import IndexProblem

F64 = torch.float64


@dataclass(frozen=True)
class Term:
    """An adapter and its weight; name: for people."""

    name: str
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Sum:
    """One module of the sum: ΔW = b·a, b o × r, a r × n, float64.

    kernel: the shape of one row of ``a`` in a file: (n,), or (i, kh, kw) of a convolution.
    """

    place: Place
    b: Tensor
    a: Tensor
    kernel: tuple[int, ...]

    @property
    def delta(self) -> LowRank:
        """As a ΔW, to be measured."""
        return LowRank(self.b, self.a)


def check(term: Term) -> None:
    """Raises IndexProblem where an adapter does something that no sum of ΔW can hold."""
    plan = term.adapter.plan
    what = ""
    if any(module.parameters for module in plan.modules):
        what = f"it is of the family {plan.family}, which has no ΔW without the base model"
    elif any(module.place.vector for module in plan.modules):
        what = "it changes biases or norms, for which a LoRA has no factors"
    elif plan.extras:
        what = f"it does more than its ΔW ({next(iter(plan.extras))})"
    elif plan.unread_keys:
        what = f"its key {plan.unread_keys[0]} is not understood"
    if what:
        raise IndexProblem(f"{term.name} cannot be mixed: {what}.")


def total(terms: Sequence[Term]) -> Iterator[Sum]:
    """The modules of Σ w·ΔW, by name; one is in memory at a time.

    Factors are put side by side: the ranks add up. A ΔW that has none is its own factor. Raises
    IndexProblem where two adapters have a module of two shapes.
    """
    plans = [{m.name: m for m in term.adapter.plan.modules} for term in terms]
    for name in sorted(set().union(*plans)):
        parts: list[tuple[Tensor, Tensor]] = []
        kernel: tuple[int, ...] | None = None
        shape: tuple[int, int] | None = None
        place: Place | None = None
        for term, modules in zip(terms, plans, strict=True):
            if name not in modules or term.weight == 0.0:
                continue
            delta = modules[name].bind(term.adapter.fetch)
            place = modules[name].place
            if shape is not None and delta.shape != shape:
                raise IndexProblem(
                    f"{term.name} cannot be mixed with {terms[0].name}: {name} is of another "
                    f"shape, {delta.shape} instead of {shape}."
                )
            shape = delta.shape
            if delta.is_zero:
                continue
            kernel = kernel or _kernel(delta)
            b, a = _factors(delta)
            parts.append((b * term.weight, a))
        if not parts:
            continue
        assert place is not None and shape is not None
        if kernel is None and place.group == "conv":
            raise IndexProblem(
                f"{terms[0].name} cannot be merged: no file says the kernel of the convolution "
                f"{name}."
            )
        b, a = (
            torch.cat(side, dim) for side, dim in zip(zip(*parts, strict=True), (1, 0), strict=True)
        )
        yield Sum(place, b, a, kernel or (shape[1],))


def reduced(one: Sum, rank: int) -> tuple[Sum, float, float]:
    """The nearest ΔW of a rank (Eckart-Young), ‖ΔW‖² before, and what was lost of it.

    b = Q·R and aᵀ = Q'·R', so that ΔW = Q·(R·R'ᵀ)·Q'ᵀ and the singular values are those of a
    small matrix.
    """
    q, r = torch.linalg.qr(one.b)
    q_a, r_a = torch.linalg.qr(one.a.T)
    u, s, vh = torch.linalg.svd(r @ r_a.T, full_matrices=False)
    whole = float(s.square().sum())
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    b, a = (q @ u[:, :kept]) * root, root[:, None] * (vh[:kept] @ q_a.T)
    return Sum(one.place, b, a, one.kernel), whole, float(s[kept:].square().sum())


def _factors(delta: Delta) -> tuple[Tensor, Tensor]:
    """(B, A), float64. Where they would be more numbers than ΔW, ΔW and a unit matrix."""
    pair = delta.factors(F64)
    o, n = delta.shape
    if pair is not None and pair[0].shape[1] <= min(o, n):
        return pair
    dense = delta.dense(F64)
    unit = torch.eye(min(o, n), dtype=F64)
    return (dense, unit) if n <= o else (unit, dense)


def _kernel(delta: Delta) -> tuple[int, ...] | None:
    """(i, kh, kw) where the stored tensors show a convolution, None where they do not."""
    n = delta.shape[1]
    stored = delta.tensors()
    if isinstance(delta, LowRank):
        inner = tuple(delta.down.shape[1:])
        if delta.mid is not None:
            inner = (inner[0], *delta.mid.shape[2:])
        return inner if math.prod(inner) == n else None
    for tensor in stored.values():
        if tensor.dim() > 2 and math.prod(tensor.shape[1:]) == n:
            return tuple(tensor.shape[1:])
    return None
