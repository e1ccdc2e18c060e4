"""Inner products through the factors against dense matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lorafind.formats.delta import Delta, Full, Hadamard, Kronecker, LowRank
from lorafind.signatures.products import gram_inner, inner, products

O, N = 48, 60  # noqa: E741
G = torch.Generator().manual_seed(5)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.einsum("ac,bd->abcd", w1.double(), w2.double()).reshape(O, N)


def cases() -> dict[str, tuple[Delta, Tensor]]:
    """Name → a form, and its ΔW from the definition of the form."""
    found: dict[str, tuple[Delta, Tensor]] = {}
    for rank in (1, 5):
        b, a = rand(O, rank), rand(rank, N)
        found[f"lora{rank}"] = LowRank(b, a, 0.5), 0.5 * b.double() @ a.double()
    w = [rand(O, 2), rand(2, N), rand(O, 2), rand(2, N)]
    dense = (w[0].double() @ w[1].double()) * (w[2].double() @ w[3].double())
    found["loha, factors"] = Hadamard(w[0], w[1], w[2], w[3], -2.0), -2 * dense
    w = [rand(O, 6), rand(6, N), rand(O, 6), rand(6, N)]
    dense = (w[0].double() @ w[1].double()) * (w[2].double() @ w[3].double())
    found["loha, dense"] = Hadamard(w[0], w[1], w[2], w[3], 1.5), 1.5 * dense
    w1, w2 = rand(4, 6), rand(12, 10)
    found["lokr"] = Kronecker(w1=w1, w2=w2, scale=3.0), 3 * kron(w1, w2)
    w1, w2 = rand(4, 6), rand(12, 10)
    found["lokr, same cut"] = Kronecker(w1=w1, w2=w2), kron(w1, w2)
    w1, w2 = rand(8, 3), rand(6, 20)
    found["lokr, other cut"] = Kronecker(w1=w1, w2=w2, scale=0.25), 0.25 * kron(w1, w2)
    w1, a, b = rand(4, 6), rand(12, 2), rand(2, 10)
    found["lokr, factors"] = Kronecker(w1=w1, w2_a=a, w2_b=b), kron(w1, a.double() @ b.double())
    full = rand(O, N)
    found["full"] = Full(full), full.double()
    return found


CASES = cases()
PAIRS = list(itertools.product(CASES, CASES))


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_inner(one: str, two: str) -> None:
    (x, dense_x), (y, dense_y) = CASES[one], CASES[two]
    expected = float((dense_x * dense_y).sum())
    size = float(dense_x.norm() * dense_y.norm())
    assert inner(x, y) == pytest.approx(expected, abs=1e-13 * size)


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_gram_inner(one: str, two: str) -> None:
    (x, dense_x), (y, dense_y) = CASES[one], CASES[two]
    k_x, k_y = dense_x @ dense_x.T, dense_y @ dense_y.T
    assert gram_inner(x, y) == pytest.approx(float((k_x * k_y).sum()), rel=1e-11)
    eye = torch.eye(O, dtype=torch.float64)
    k_x, k_y = k_x - k_x.trace() / O * eye, k_y - k_y.trace() / O * eye
    size = float(k_x.norm() * k_y.norm())
    found = products(x, y, grams=True)
    assert found.k_xy == pytest.approx(float((k_x * k_y).sum()), abs=1e-11 * size)
    assert found.k_xx == pytest.approx(float(k_x.square().sum()), rel=1e-10)
    assert found.k_yy == pytest.approx(float(k_y.square().sum()), rel=1e-10)


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_products(one: str, two: str) -> None:
    (x, dense_x), (y, dense_y) = CASES[one], CASES[two]
    found = products(x, y)
    xx, yy = float(dense_x.square().sum()), float(dense_y.square().sum())
    assert (found.xx, found.yy) == pytest.approx((xx, yy), rel=1e-12)
    assert found.xy == pytest.approx(float((dense_x * dense_y).sum()), abs=1e-13 * (xx * yy) ** 0.5)
    assert math.isnan(found.k_xy)


def test_sizes_tell_what_cancels() -> None:
    b, a = rand(O, 2), rand(2, N)
    nothing = LowRank(torch.cat([b, -b], 1), torch.cat([a, a]))
    found = products(nothing, CASES["lora5"][0])
    once = float((b.double().square().sum(0) * a.double().square().sum(1)).sum())
    assert found.x_size == pytest.approx(2 * once)
    assert found.xx <= 1e-12 * found.x_size


def test_tall_dense_forms_meet_on_their_short_side() -> None:
    x, y = rand(40, 7), rand(40, 7)
    expected = float((x.double() @ x.double().T * (y.double() @ y.double().T)).sum())
    assert gram_inner(Full(x), Full(y)) == pytest.approx(expected, rel=1e-12)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(48, 60\).*\(60, 48\)"):
        inner(Full(rand(O, N)), Full(rand(N, O)))
    with pytest.raises(ValueError, match="no inner product"):
        gram_inner(Full(rand(O, N)), Full(rand(N, O)))
    with pytest.raises(ValueError, match="no inner product"):
        products(Full(rand(O, N)), Full(rand(N, O)))


class Structured(Kronecker):
    """A Kronecker product that must not be built."""

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        raise AssertionError("a Kronecker product was built")


def test_a_kronecker_product_is_not_built_to_meet_others() -> None:
    x = Structured(w1=rand(4, 6), w2=rand(12, 10))
    for other in ("lora5", "lokr, same cut", "lokr, factors", "full"):
        inner(x, CASES[other][0])
        inner(CASES[other][0], x)
