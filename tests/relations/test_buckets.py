"""The search for copies: whatever may be proved to hold one ΔW is near, by its own tolerances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorafind.formats.delta import LowRank
from lorafind.relations import buckets, core, verify
from lorafind.relations.buckets import REACH, Near, points, possible
from lorafind.signatures.constants import IDENTITY
from lorafind.signatures.features import signature
from lorafind.signatures.sketch import Sketcher
from tests.relations.test_candidates import CPU, place, random_lora

Lora = dict[int, LowRank]


def described(loras: list[Lora]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Identity records as the index keeps them, and the norms of the modules."""
    record = np.zeros(len(loras), IDENTITY)
    norms = []
    for row, lora in zip(record, loras, strict=True):
        sketcher = Sketcher(CPU)
        sketcher.add((place(k), delta) for k, delta in lora.items())
        made = signature(sketcher)
        row["sketch"], row["norms"] = made.identity, made.segment_norms
        order = sorted(range(len(made.places)), key=lambda i: made.places[i].name)
        norms.append(made.norms[order].astype(np.float32))
    return record, norms


def near(record: np.ndarray) -> set[frozenset[int]]:
    tree = Near(points(record))
    return {
        frozenset((i, int(j)))
        for i, found in tree.around(np.arange(len(record)))
        for j in found
        if i != j
    }


def moved(lora: Lora, seed: int, only: int | None = None) -> Lora:
    """As far away as a proof may allow: all in one direction, in every module or in one alone."""
    g = torch.Generator().manual_seed(seed)
    other = {
        k: LowRank(torch.randn(d.up.shape, generator=g), torch.randn(d.down.shape, generator=g))
        for k, d in lora.items()
        if only is None or k == only
    }
    size, far = (math.sqrt(sum(d.squared_norm() for d in one.values())) for one in (lora, other))
    by = 0.999 * REACH * size / far
    return {
        k: LowRank(torch.cat([d.up, other[k].up * by], 1), torch.cat([d.down, other[k].down]))
        if k in other
        else d
        for k, d in lora.items()
    }


def test_the_reach_is_that_of_the_proofs() -> None:
    expected = math.sqrt(core.MOST_ALLOWED * verify.TOTAL**2 + verify.FLOOR)
    assert expected == pytest.approx(REACH, rel=1e-12)


@pytest.mark.parametrize("only", [None, 0, 40])
def test_nothing_within_the_reach_is_missed(only: int | None) -> None:
    loras: list[Lora] = []
    for seed in range(40):
        one = random_lora(seed, rank=1 if only else 4)
        loras += [one, moved(one, 500 + seed, only)]
    record, norms = described(loras)
    pairs = {frozenset((2 * i, 2 * i + 1)) for i in range(40)}
    assert pairs <= near(record)
    assert all(possible(norms[2 * i], norms[2 * i + 1]) for i in range(40))


@pytest.mark.parametrize("factor", [1 + REACH, 1 - REACH])
def test_norms_at_the_bound_are_near(factor: float) -> None:
    one = random_lora(3)
    record, norms = described([one, {k: LowRank(d.up * factor, d.down) for k, d in one.items()}])
    assert near(record) == {frozenset((0, 1))}
    assert possible(norms[0], norms[1])


@pytest.mark.parametrize("factor", [1 + 2 * REACH, 0.5, -1.0])
def test_other_factors_are_not(factor: float) -> None:
    one = random_lora(4)
    record, _ = described([one, {k: LowRank(d.up * factor, d.down) for k, d in one.items()}])
    assert near(record) == set()


def test_strangers_are_not_near() -> None:
    """Of one size, so that the norm alone tells nothing of them."""
    loras = [random_lora(700 + seed) for seed in range(120)]
    record, _ = described(loras)
    record["norms"] /= np.linalg.norm(record["norms"], axis=1, keepdims=True)
    assert len(near(record)) <= 1


def test_norms_of_modules_sort_out_what_is_not_one() -> None:
    one = random_lora(5)
    _, (a, b) = described([one, {**one, 7: LowRank(one[7].up * 1.4, one[7].down)}])
    assert not possible(a, b)
    assert possible(a, a[::-1].copy(), (list("abcdefgh" * 8), list("abcdefgh" * 8))) is False


def test_layouts_that_differ_by_a_module_of_nothing() -> None:
    """Rounding can take a faint module away; a module that matters it cannot."""
    names = [f"m{k}" for k in range(10)]
    norms = np.array([1.0] * 9 + [1e-5], np.float32)
    assert possible(norms, norms[:9], (names, names[:9]))
    assert not possible(norms, norms[1:], (names, names[1:]))


def test_the_projections_have_length_one() -> None:
    assert np.linalg.norm(buckets._signs().astype(np.float64), axis=0) == pytest.approx(
        1.0, rel=1e-6
    )


@pytest.mark.parametrize("grown", [1, 8, 63])
def test_a_few_modules_at_the_bound_are_possible(grown: int) -> None:
    """Modules that grew by all that a proof allows, along themselves: nothing moves norms more."""
    one = random_lora(6)
    total = math.sqrt(sum(d.squared_norm() for d in one.values()))
    part = math.sqrt(sum(one[k].squared_norm() for k in range(grown)))
    by = 1 + 0.999 * REACH * total / part
    record, (a, b) = described(
        [one, {k: LowRank(d.up * (by if k < grown else 1.0), d.down) for k, d in one.items()}]
    )
    assert near(record) == {frozenset((0, 1))}
    assert possible(a, b)
    assert possible(b, a)
