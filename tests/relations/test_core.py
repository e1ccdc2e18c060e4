"""The exact compression of a pair of modules, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lorafind.formats.delta import ROUNDING, Delta, Full, Hadamard, Kronecker, LowRank
from lorafind.relations.core import Sides, measure, overlap, squared_norm
from tests.relations.made import copy

F64 = torch.float64


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loha(
    shapes: list[tuple[int, int]], scale: float, t1: Tensor | None = None, t2: Tensor | None = None
) -> Hadamard:
    a, b, c, d = (randn(*shape, seed=i) for i, shape in enumerate(shapes * 2))
    return Hadamard(a, b, c, d, scale, t1, t2)


def lora(o: int, n: int, r: int, seed: int, scale: float = 0.5) -> LowRank:
    return LowRank(randn(o, r, seed=seed), randn(r, n, seed=seed + 1000), scale)


PAIRS: dict[str, tuple[Delta, Delta]] = {
    "tall": (lora(96, 40, 3, 1), lora(96, 40, 5, 2)),
    "wide": (lora(24, 90, 4, 1), lora(24, 90, 4, 2)),
    "ranks above the width": (lora(12, 14, 8, 1), lora(12, 14, 16, 2)),
    "convolution": (
        LowRank(randn(32, 4, 1, 1, seed=1), randn(4, 10, 3, 3, seed=2), 2.0),
        LowRank(
            randn(32, 2, 1, 1, seed=3),
            randn(2, 10, 1, 1, seed=4),
            1.0,
            randn(2, 2, 3, 3, seed=5),
        ),
    ),
    "loha and lora": (
        loha([(60, 2), (2, 50)], 0.5),
        lora(60, 50, 3, 9),
    ),
    "full and lora": (Full(randn(30, 40, seed=1)), lora(30, 40, 3, 2)),
    "lokr of equal parts": (
        Kronecker(w1=randn(4, 3, seed=1), w2=randn(8, 12, seed=2), scale=0.3),
        Kronecker(
            w1=randn(4, 3, seed=3), w2_a=randn(8, 2, seed=4), w2_b=randn(2, 12, seed=5), scale=2.0
        ),
    ),
    "lokr with factors and lora": (
        Kronecker(
            w1_a=randn(8, 2, seed=1),
            w1_b=randn(2, 6, seed=2),
            w2_a=randn(12, 2, seed=3),
            w2_b=randn(2, 10, seed=4),
            scale=0.7,
        ),
        lora(96, 60, 3, 2),
    ),
    "lokr of other parts": (
        Kronecker(w1=randn(4, 3, seed=1), w2=randn(8, 12, seed=2)),
        Kronecker(w1=randn(8, 6, seed=3), w2=randn(4, 6, seed=4)),
    ),
    "bias": (Full(randn(50, seed=1)), Full(randn(50, seed=2))),
}


@pytest.mark.parametrize("x, y", PAIRS.values(), ids=PAIRS)
def test_numbers_of_a_pair_are_those_of_the_dense_matrices(x: Delta, y: Delta) -> None:
    a, b = x.dense(), y.dense()
    m = measure(x, y, "F32", "F32")
    inner = float((a * b).sum())
    assert m.xx == pytest.approx(float(a.square().sum()), rel=1e-12)
    assert m.yy == pytest.approx(float(b.square().sum()), rel=1e-12)
    assert m.xy == pytest.approx(inner, rel=1e-11, abs=1e-11)
    for c in (1.0, -0.4, 3.0):
        assert m.from_x(c) == pytest.approx(float((b - c * a).square().sum()), rel=1e-11)
        assert m.from_y(c) == pytest.approx(float((a - c * b).square().sum()), rel=1e-11)
    o, n = x.shape
    sides = [float(t.square().sum()) / w for t, w in ((a @ b.T, o), (a.T @ b, n)) if w > 1]
    assert m.chance == pytest.approx(max(sides), rel=1e-10)
    light = overlap(x, y)
    assert (light.xx, light.yy, light.chance) == pytest.approx((m.xx, m.yy, m.chance), rel=1e-10)
    assert light.xy == pytest.approx(m.xy, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", ["tall", "full and lora", "loha and lora", "convolution"])
def test_tail_is_what_the_best_approximation_of_the_other_rank_loses(name: str) -> None:
    for x, y in (PAIRS[name], PAIRS[name][::-1]):
        m = measure(x, y, "F32", "F32")
        values = torch.linalg.svdvals(x.dense()).square()
        expected = float(values[m.y_rank :].sum()) if m.y_rank < m.x_rank else 0.0
        assert m.x_tail == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cores_are_small() -> None:
    x_hat, y_hat = Sides(lora(500, 300, 4, 1), lora(500, 300, 6, 2)).cores()
    assert x_hat.shape == y_hat.shape == (10, 10)


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10, 1e-12])
def test_a_residual_far_below_the_cosine_is_seen(size: float) -> None:
    x = lora(200, 150, 6, 1)
    off = lora(200, 150, 1, 5)
    weight = size * math.sqrt(x.squared_norm() / off.squared_norm())
    y = LowRank(
        torch.cat([x.up * x.scale, off.up * (off.scale * weight)], 1),
        torch.cat([x.down, off.down]),
    )
    m = measure(x, y, "F32", "F32")
    assert math.sqrt(m.from_x(1.0) / m.xx) == pytest.approx(size, rel=5e-3)
    if size < 1e-8:
        assert m.xy / math.sqrt(m.xx * m.yy) > 1 - 1e-15  # the cosine is blind to it


def test_the_factorisation_does_not_matter() -> None:
    x = lora(120, 80, 5, 1)
    g = torch.diag(torch.logspace(0, 3, 5, dtype=F64)) @ randn(5, 5, seed=3)
    y = LowRank(x.up @ g, torch.linalg.inv(g) @ x.down, x.scale)
    m = measure(x, y, "F32", "F32")
    assert math.sqrt(m.from_x(1.0) / m.xx) < 1e-12


def test_factors_that_cancel_are_zero() -> None:
    up, down = randn(20, 2, seed=1), randn(2, 30, seed=2)
    x = LowRank(torch.cat([up, -up], 1), torch.cat([down, down]))
    assert squared_norm(x) == 0.0
    assert measure(x, lora(20, 30, 2, 3), "F32", "F32").xx == 0.0
    assert overlap(x, lora(20, 30, 2, 3)).xx == 0.0


def test_strangers_with_one_common_factor_scatter_as_chance_says() -> None:
    x, sums, chances = lora(40, 25, 3, 1), [], []
    for seed in range(2, 402):
        y = LowRank(randn(40, 3, seed=seed), x.down, 1.0)
        light = overlap(x, y)
        sums.append(light.xy**2 / light.xx / light.yy)
        chances.append(light.chance / light.xx / light.yy)
    assert sum(sums) / sum(chances) == pytest.approx(1.0, abs=0.25)


FORMS: dict[str, Delta] = {
    "lora": lora(320, 160, 8, 1),
    "tucker": LowRank(
        randn(64, 8, 1, 1, seed=1), randn(8, 96, 1, 1, seed=2), 0.5, randn(8, 8, 3, 3, seed=3)
    ),
    "loha": loha([(64, 4), (4, 96)], 2.0),
    "loha tucker": loha(
        [(4, 64), (4, 96)], 2.0, randn(4, 4, 3, 3, seed=8), randn(4, 4, 3, 3, seed=9)
    ),
    "lokr": Kronecker(w1=randn(16, 8, seed=1), w2=randn(64, 96, seed=2), scale=3.0),
    "lokr factored": Kronecker(
        w1=randn(16, 8, seed=1), w2_a=randn(64, 4, seed=2), w2_b=randn(4, 96, seed=3)
    ),
    "lokr tucker": Kronecker(
        w1=randn(16, 8, seed=1),
        w2_a=randn(4, 64, seed=2),
        w2_b=randn(4, 96, seed=3),
        t2=randn(4, 4, 3, 3, seed=4),
    ),
    "full": Full(randn(64, 96, seed=1)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1.0, 3e-5])
def test_rounding_is_as_predicted(form: str, dtype: torch.dtype, size: float) -> None:
    # 3e-5 is where F16 has subnormals only.
    x = FORMS[form]
    first = next(iter(x.tensors()))
    x = copy(x, **{first: x.tensors()[first] * size})
    y = copy(x, **{role: t.to(dtype).to(F64) for role, t in x.tensors().items()})
    error = float((x.dense() - y.dense()).square().sum())
    name = "F16" if dtype == torch.float16 else "BF16"
    assert math.sqrt(error / x.squared_rounding(ROUNDING[name])) == pytest.approx(1.0, abs=0.2)
