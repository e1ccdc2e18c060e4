"""What bits prove, and what equal bits do not."""

from __future__ import annotations

import torch

from lorafind.formats.delta import Gain, Kronecker, LowRank
from lorafind.relations.bits import explained


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_alpha_that_was_rounded_with_a_fused_layer() -> None:
    """α = 257 is 256 in BF16; of a part with fewer columns than α was divided by as well."""
    up = torch.zeros(6, 6)
    for part in range(3):
        rows, columns = slice(2 * part, 2 * part + 2), slice(2 * part, 2 * part + 2)
        up[rows, columns] = randn(2, 2, seed=part)
    down = randn(6, 5, seed=9)
    whole = LowRank(up, down, 257 / 6)
    cast = LowRank(up.bfloat16(), down.bfloat16(), 256 / 6)
    assert explained(whole, cast, "BF16", ()) == (1.0,)
    x, y = whole.rows(2, 4), cast.rows(2, 4)
    assert (x.rank, x.divisor) == (2, 6)
    assert explained(x, y, "BF16", ()) == (1.0,)
    other = LowRank(up.bfloat16(), down.bfloat16(), 300 / 6)
    (c,) = explained(x, other.rows(2, 4), "BF16", ())
    assert abs(c - 300 / 257) < 1e-12


def test_the_same_numbers_in_other_kronecker_factors() -> None:
    one, two = randn(6, seed=1), randn(6, seed=2)
    x = Kronecker(w1=one.view(2, 3), w2=two.view(3, 2))
    y = Kronecker(w1=one.view(3, 2), w2=two.view(2, 3))
    assert x.shape == y.shape
    assert not torch.allclose(x.dense(), y.dense())
    assert explained(x, y, "F32", (1.0,)) == ()
    assert explained(x, x, "F32", (1.0,)) == (1.0,)


def test_twice_the_factors_are_not_twice_the_change() -> None:
    gain = 1 + randn(8, seed=3).abs()
    x, y = (Gain(g, inputs=True, offset=-1.0) for g in (gain, 2 * gain))
    assert explained(x, y, "F32", (2.0,)) == ()
    assert explained(x, x, "F32", (2.0,)) == (1.0,)
