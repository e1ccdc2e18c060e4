"""Rows of a fused layer's ΔW: the parts together are the whole, in every number that is asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafind.formats.delta import (
    ROUNDING,
    Delta,
    Diagonal,
    Full,
    Gain,
    Hadamard,
    Kronecker,
    KroneckerRows,
    LowRank,
    Residual,
    Skew,
)
from lorafind.formats.delta.base import Rounding

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
ALL = settings(max_examples=40, deadline=None)


class Source:
    """Random tensors of one dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def lora(g: Source, o: int, r: int, k: int) -> Delta:
    return LowRank(g(o, r), g(r, 5, k, k), 0.5)


def tucker(g: Source, o: int, r: int, k: int) -> Delta:
    return LowRank(g(o, r, 1, 1), g(r + 1, 4, 1, 1), 2.0, g(r, r + 1, k, k))


def adalora(g: Source, o: int, r: int, k: int) -> Delta:
    return Diagonal(g(o, r), g(r, 1), g(r, 7), 0.3)


def vera(g: Source, o: int, r: int, k: int) -> Delta:
    return Diagonal(g(o, r), g(r), g(r, 7), outer=g(o))


def loha(g: Source, o: int, r: int, k: int) -> Delta:
    return Hadamard(g(o, r), g(r, 4 * k * k), g(o, r), g(r, 4 * k * k), 0.5)


def loha_tucker(g: Source, o: int, r: int, k: int) -> Delta:
    a, b, t = g(r, o), g(r, 4), g(r, r, k, k)
    return Hadamard(a, b, g(r, o), g(r, 4), 0.5, t, g(r, r, k, k))


def full(g: Source, o: int, r: int, k: int) -> Delta:
    return Full(g(o, 3, k, k))


def sparse(g: Source, o: int, r: int, k: int) -> Delta:
    rows = torch.randint(0, o, (6,), generator=g.generator)
    columns = torch.randint(0, 5, (6,), generator=g.generator)
    return Residual(LowRank(g(o, r), g(r, 5), 0.5), torch.stack([rows, columns]).short(), g(6))


def lokr(first: str, second: str) -> Callable[[Source, int, int, int], Delta]:
    def make(g: Source, o: int, r: int, k: int) -> Delta:
        a, b = {2: (1, 2), 6: (2, 3), 12: (3, 4), 20: (5, 4)}[o]
        parts: dict[str, Any] = (
            {"w1": g(a, 3)} if first == "whole" else {"w1_a": g(a, r), "w1_b": g(r, 3)}
        )
        if second == "whole":
            parts["w2"] = g(b, 5, k, k)
        elif second == "factored":
            parts |= {"w2_a": g(b, r), "w2_b": g(r, 20 * k * k)}
        else:
            parts |= {"w2_a": g(r, b), "w2_b": g(r, 5), "t2": g(r, r, k, k)}
        return Kronecker(**parts, scale=0.7)

    return make


FORMS = {
    "lora": lora,
    "tucker": tucker,
    "adalora": adalora,
    "vera": vera,
    "loha": loha,
    "loha_tucker": loha_tucker,
    "full": full,
    "sparse": sparse,
} | {
    f"lokr_{first}_{second}": lokr(first, second)
    for first in ("whole", "factored")
    for second in ("whole", "factored", "tucker")
}


@pytest.mark.parametrize("form", FORMS)
@ALL
@given(data=st.data())
def test_rows_stacked_are_the_whole(form: str, data: st.DataObject) -> None:
    g = Source(data.draw(st.integers(0, 2**32 - 1)), data.draw(DTYPES))
    o = data.draw(st.sampled_from([2, 6, 12, 20]))
    whole = FORMS[form](g, o, data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3])))
    dense = whole.dense()
    cuts = sorted({0, o, *data.draw(st.lists(st.integers(1, o - 1), max_size=4))})
    expected = 0.0
    for start, stop in itertools.pairwise(cuts):
        part = whole.rows(start, stop)
        same(part, dense[start:stop])
        expected += part.squared_rounding(ROUNDING["F16"])
        middle = (start + stop) // 2
        if start < middle:
            same(part.rows(0, middle - start), dense[start:middle])
    # Zeros that are left out do not err; they add no more than the spacing of subnormals.
    assert expected == pytest.approx(whole.squared_rounding(ROUNDING["F16"]), rel=1e-6)


def same(part: Delta, dense: Tensor) -> None:
    """Every number of a part against the rows themselves."""
    size = float(dense.norm())
    assert part.shape == dense.shape
    assert float((part.dense() - dense).norm()) <= 1e-12 * size
    assert part.squared_norm() == pytest.approx(size**2, rel=1e-9)
    assert part.is_zero == (not dense.any())
    assert part.is_finite()
    pair = part.factors()
    if pair is None:
        assert part.grams() is None
        return
    b, a = pair
    assert float((b @ a - dense).norm()) <= 1e-11 * size
    grams = part.grams()
    assert grams is not None
    torch.testing.assert_close(grams, (b.T @ b, a @ a.T), rtol=1e-9, atol=1e-12)


@ALL
@given(
    ranks=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    heights=st.lists(st.integers(2, 4), min_size=4, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    shuffled=st.booleans(),
)
def test_parts_of_a_block_diagonal_layer_have_their_own_rank(
    ranks: list[int], heights: list[int], seed: int, shuffled: bool
) -> None:
    g = Source(seed, torch.float32)
    parts = [(g(h, r), g(r, 7)) for h, r in zip(heights, ranks, strict=False)]
    up, down = torch.block_diag(*(b for b, _ in parts)), torch.cat([a for _, a in parts])
    if shuffled:
        order = torch.randperm(len(down), generator=g.generator)
        up, down = up[:, order].contiguous(), down[order].contiguous()
    fused, start = LowRank(up, down, 0.25), 0
    for b, a in parts:
        cut = fused.rows(start, start + len(b))
        assert isinstance(cut, LowRank) and cut.rank == len(a) and cut.scale == 0.25
        assert cut.divisor == cut.rows(0, 1).divisor == len(down)
        torch.testing.assert_close(cut.dense(), 0.25 * b.double() @ a.double())
        if not shuffled:
            assert cut.down.untyped_storage().data_ptr() == down.untyped_storage().data_ptr()
        start += len(b)


def test_rows_of_a_dense_layer_share_the_stored_tensors() -> None:
    g = Source(0, torch.bfloat16)
    fused = LowRank(g(12, 3), g(3, 5))
    part = fused.rows(4, 8)
    assert isinstance(part, LowRank)
    assert part.down is fused.down
    assert part.up.untyped_storage().data_ptr() == fused.up.untyped_storage().data_ptr()


def test_a_part_that_is_zero_is_so_and_keeps_a_rank() -> None:
    up = torch.zeros(6, 3)
    up[:3] = Source(0, torch.float32)(3, 3)
    part = LowRank(up, Source(1, torch.float32)(3, 5)).rows(3, 6)
    assert part.is_zero and part.rank == 1
    assert not part.dense().any()


def test_a_kronecker_product_stays_one_where_the_cut_allows() -> None:
    g = Source(0, torch.float32)
    whole = Kronecker(g(3, 2), w2=g(4, 5))
    assert isinstance(whole.rows(4, 12), Kronecker)
    assert isinstance(whole.rows(5, 7), Kronecker)  # within one row of w1
    assert isinstance(whole.rows(3, 9), KroneckerRows)


def test_another_place_is_another_set_of_tensors() -> None:
    """Equal tensors must not prove two cuts equal that begin in other rows."""
    g = Source(0, torch.float32)
    whole = Kronecker(g(3, 2), w2=g(4, 5))
    one, two = whole.rows(1, 10), whole.rows(2, 11)
    assert one.shape == two.shape and not torch.equal(one.dense(), two.dense())
    assert one.tensors().keys() != two.tensors().keys()


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 3), (4, 2), (0, 13)])
def test_rows_that_are_not_there(start: int, stop: int) -> None:
    g = Source(0, torch.float32)
    with pytest.raises(ValueError, match="12 rows"):
        LowRank(g(12, 3), g(3, 5)).rows(start, stop)


def test_a_block_of_a_rotation_is_not_cut() -> None:
    skew = Skew(Source(0, torch.float32)(3, 4, 4))
    torch.testing.assert_close(skew.rows(4, 12).dense(), skew.dense()[4:])
    with pytest.raises(ValueError, match="block of 4"):
        skew.rows(2, 6)


@pytest.mark.parametrize("form", FORMS)
def test_the_predicted_rounding_error_is_that_of_rounding(form: str) -> None:
    """‖ΔW(rounded) − ΔW‖² averaged over many matrices, against its expectation."""
    unit = Rounding(2.0**-8, 0.0)
    seen = expected = 0.0
    for seed in range(200):
        whole = FORMS[form](Source(seed, torch.float32), 20, 3, 3)
        part = whole.rows(3, 18)
        rounded = FORMS[form](Rounded(seed), 20, 3, 3).rows(3, 18)
        seen += float((rounded.dense() - part.dense()).square().sum())
        expected += part.squared_rounding(unit)
    # The model spreads mantissas over the logarithm; those of normal numbers err 8 % more.
    assert expected == pytest.approx(0.92 * seen, rel=0.12)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: Skew(g(6, 5, 5), 0.5),
        lambda g: Skew(g(6, 10), 0.5, 5),
        lambda g: Gain(g(50), True, -1.0),
        lambda g: Full(g(10, 5), 2.0, -1.0),
    ],
)
def test_the_same_of_parameters(make: Callable[[Source], Delta]) -> None:
    unit = Rounding(2.0**-8, 0.0)
    seen = expected = 0.0
    for seed in range(200):
        whole = make(Source(seed, torch.float32))
        seen += float((make(Rounded(seed)).dense() - whole.dense()).square().sum())
        expected += whole.squared_rounding(unit)
    assert expected == pytest.approx(0.92 * seen, rel=0.12)


class Rounded(Source):
    """The same numbers, rounded to bfloat16."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, torch.float32)

    def __call__(self, *shape: int) -> Tensor:
        return super().__call__(*shape).bfloat16().float()


def test_small_columns_of_double_precision_are_kept() -> None:
    up = torch.tensor([[0.0, 1e-75], [1.0, 0.0]], dtype=torch.float64)
    delta = LowRank(up, torch.eye(2, dtype=torch.float64))
    assert torch.equal(delta.rows(0, 1).dense(), delta.dense()[:1])


def test_large_products_of_small_factors_are_not_made() -> None:
    """A few kilobytes of factors would be gigabytes of P ⊗ U."""
    small = Kronecker(torch.ones(2, 3), w2_a=torch.ones(40, 2), w2_b=torch.ones(2, 40))
    assert small.factors() is not None
    large = Kronecker(torch.ones(2**20, 3), w2_a=torch.ones(40, 2), w2_b=torch.ones(2, 40))
    assert large.factors() is None and large.grams() is None
