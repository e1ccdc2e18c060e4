"""Verdicts on planted merges and on kin, over adapters in memory."""

from __future__ import annotations

import pytest
import torch

from lorafind.trace.factorsum import factor_sum
from lorafind.trace.fit import Verdict, decide
from lorafind.trace.numbers import measure
from tests.relations.made import adapter, layout, trained
from tests.trace.made import Modules, Weights, concatenated, factor_summed, resized

SHAPES = layout(width=64, context=48, text=40)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parents(count: int, rank: int = 3) -> list[Modules]:
    return [trained(SHAPES, rank + k % 2, seed=100 + k, alpha=2.0) for k in range(count)]


def verdict(target: Modules, known: list[Modules]) -> Verdict:
    return decide(measure(adapter(target), [adapter(k) for k in known]))


def check(found: Verdict, weights: list[float], within: float = 0.02) -> None:
    told = {w.at: w.weight for w in found.weights}
    assert set(told) == set(range(len(weights)))
    for at, weight in enumerate(weights):
        assert told[at] == pytest.approx(weight, rel=within)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_sum_of_all_parents_is_proved(count: int, dtype: torch.dtype) -> None:
    weights = torch.linspace(0.1, 1.0, count).tolist()
    family, strangers = parents(count), [trained(SHAPES, 4, seed=k) for k in (1, 2)]
    found = verdict(concatenated(family, weights, dtype), family + strangers)
    check(found, weights)
    assert found.complete and found.lost < 1e-6
    assert {w.proof for w in found.weights} == {"sum"}
    assert found.left < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resize_takes_nothing_from_the_weights(dtype: torch.dtype) -> None:
    weights = [1.0, 0.6, 0.4]
    family = parents(3)
    found = verdict(resized(family, weights, 5, dtype), [*family, trained(SHAPES, 4, seed=1)])
    check(found, weights)
    assert found.complete and found.lost > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 16])
def test_a_parent_is_proved_where_another_is_missing(dtype: torch.dtype, rank: int) -> None:
    weights = [0.5, 1.0, 0.3]
    family = parents(3)
    merged = resized(family, weights, rank, dtype) if rank else concatenated(family, weights, dtype)
    found = verdict(merged, [*family[:2], trained(SHAPES, 4, seed=1)])
    check(found, weights[:2])
    assert not found.complete
    assert {w.proof for w in found.weights} == {"part"}
    missing = 1 - found.explained
    assert 0.005 < missing < 0.3


def test_block_weights() -> None:
    family = parents(2)
    weights: Weights = {name: [0.2 + 0.1 * (k % 7), 1.0] for k, name in enumerate(SHAPES)}
    found = verdict(concatenated(family, weights, torch.float16), family)
    told = {w.at: w for w in found.weights}
    assert told[0].low == pytest.approx(0.2, rel=0.02)
    assert told[0].high == pytest.approx(0.8, rel=0.02)
    assert told[1].low == pytest.approx(1.0, rel=0.02)
    assert told[1].high == pytest.approx(1.0, rel=0.02)


def wandered(start: Modules, amount: float, seed: int) -> Modules:
    """The same run a little later."""
    other = trained(SHAPES, 3, seed=seed)
    noise = concatenated([start, other], [1.0, amount], torch.float32)
    return resized([noise], [1.0], 3, torch.float32)


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.5, 1.0])
def test_kin_of_any_closeness_are_no_parents(amount: float) -> None:
    start = trained(SHAPES, 3, seed=5)
    one, two, three = (wandered(start, amount, seed) for seed in (11, 12, 13))
    assert verdict(one, [two, three]).weights == []
    # A merge of a sibling that the collection lacks.
    merged = concatenated([one, trained(SHAPES, 4, seed=9)], [1.0, 0.7], torch.float16)
    assert verdict(merged, [two, three]).weights == []


def test_an_ingredient_does_not_descend_from_the_merge() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if min(shape) > 40}
    one, two = (trained(shapes, 3, seed=seed) for seed in (5, 6))
    merged = concatenated([one, two], [0.5, 0.5], torch.float32)
    found = decide(measure(adapter(one), [adapter(merged), adapter(two)]))
    assert found.weights == [] and found.children == [0]


def test_factor_sums_are_read_off_the_factors() -> None:
    family = [trained(SHAPES, 4, seed=k, alpha=a) for k, a in ((1, 4.0), (2, 2.0), (3, 1.0))]
    ratios = [0.5, 0.3, -0.2]
    for dtype in DTYPES:
        merged = adapter(factor_summed(family, ratios, dtype))
        known = [adapter(k) for k in (*family, trained(SHAPES, 4, seed=8))]
        assert decide(measure(merged, known)).weights == []
        found = factor_sum(merged, known)
        told = {r.at: r.ratio for r in found}
        assert told == {k: pytest.approx(r, rel=0.02) for k, r in enumerate(ratios)}
        assert factor_sum(known[3], known[:3]) == []
