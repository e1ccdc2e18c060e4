"""What must never be taken for a copy."""

from __future__ import annotations

import random

import pytest
import torch

from lorafind.formats.delta import LowRank
from lorafind.relations.core import overlap
from lorafind.relations.verify import Evidence, prove
from tests.relations import made
from tests.relations.made import Modules, adapter, cast, kept

PROVED = ("file", "tensors", "weights", "cast", "scaled", "part", "resized", "reweighted")
BASE = made.trained(made.layout(), 16, alpha=8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@pytest.mark.parametrize("width", [4, 8, 16, 32, 64])
def test_strangers_have_no_relation(width: int) -> None:
    draw = random.Random(width)
    shapes = made.layout(width, max(2, width - 3), max(2, width // 2))
    for k in range(60):
        names = draw.sample(list(shapes), draw.choice((1, 2, 5, len(shapes))))
        some = {name: shapes[name] for name in names}
        r = draw.choice((1, 2, 4, 8, 32, 128))
        same_a = draw.random() < 0.5
        x = made.trained(some, r, seed=2 * k)
        y = made.trained(
            some,
            r if same_a else draw.choice((1, 2, 4, 8, 32, 128)),
            seed=2 * k + 1,
            seed_a=2 * k + 7919 if same_a else None,
        )
        one = adapter(cast(x, draw.choice(DTYPES)))
        two = adapter(cast(y, draw.choice(DTYPES)))
        assert prove(one, two) is None


def test_real_widths() -> None:
    shapes = made.real_layout(5)
    x, y = made.trained(shapes, 8), made.trained(shapes, 16, seed=1)
    assert prove(adapter(x), adapter(y)) is None
    assert prove(adapter(cast(x, torch.float16)), adapter(made.refactored(x))) is not None


def test_the_same_a_with_another_b_is_nothing() -> None:
    for rank in (1, 16):
        x = made.trained(made.layout(), rank, seed=1, seed_a=5)
        y = made.trained(made.layout(), rank, seed=2, seed_a=5)
        assert prove(adapter(x), adapter(y)) is None


def test_two_halves_are_no_copies() -> None:
    early = kept(BASE, lambda n: "down_blocks" in n)
    late = kept(BASE, lambda n: "up_blocks" in n)
    assert prove(adapter(early), adapter(late)) is None


def test_two_overlapping_halves_are_no_copies() -> None:
    early = kept(BASE, lambda n: "up_blocks" not in n)
    late = kept(BASE, lambda n: "down_blocks" not in n)
    relation = prove(adapter(early), adapter(late))
    assert relation is not None and relation.grade == "near"
    assert not any(relation.dominates)
    assert 0 < relation.share < 1


@pytest.mark.parametrize("weight", [0.5, 0.1])
@pytest.mark.parametrize("rank", [1, 16])
def test_an_ingredient_is_no_resize_of_the_merge(rank: int, weight: float) -> None:
    x = made.trained(made.layout(), rank)
    z = made.trained(made.layout(), rank, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        merge = cast(made.merged(x, z, weight), dtype)
        relation = prove(adapter(merge), adapter(cast(x, dtype)))
        assert relation is not None and relation.grade in ("near", "kin")


def test_an_orthogonal_ingredient_is_no_resize() -> None:
    # ⟨X, Y⟩ = ‖Y‖² exactly, but Y is not X at its best rank.
    g = torch.Generator().manual_seed(0)
    x: Modules = {}
    y: Modules = {}
    for name, (o, n) in made.layout().items():
        left = torch.linalg.qr(torch.randn(o, 8, generator=g, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(n, 8, generator=g, dtype=torch.float64))[0].T
        sizes = torch.tensor([4.0, 3, 2, 1, 3.5, 2.5, 1.5, 0.5], dtype=torch.float64)
        x[name] = LowRank((left * sizes).float(), right.float())
        y[name] = LowRank((left[:, :4] * sizes[:4]).float(), right[:4].float())
        whole = overlap(x[name], y[name])
        assert whole.xy == pytest.approx(whole.yy, rel=1e-6)
    relation = prove(adapter(x), adapter(y))
    assert relation is not None and relation.grade == "kin"


def test_truncated_factors_are_no_resize() -> None:
    y: Modules = {name: LowRank(d.up[:, :8], d.down[:8], d.scale) for name, d in made.lows(BASE)}
    relation = prove(adapter(BASE), adapter(y))
    assert relation is not None and relation.grade == "near"


def test_two_epochs_in_f8_are_no_cast() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        one = adapter(cast(BASE, dtype))
        two = adapter(cast(made.noisy(BASE, 0.003), dtype))
        relation = prove(one, two)
        assert relation is not None and relation.grade == "near"


def test_an_epoch_is_no_cast_of_another() -> None:
    for dtype in DTYPES:
        relation = prove(adapter(BASE), adapter(cast(made.noisy(BASE, 0.01), dtype)))
        assert relation is not None and relation.grade == "near"


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_module_changed_by_one_percent_is_seen(dtype: torch.dtype) -> None:
    for name in (next(iter(BASE)), list(BASE)[-1]):
        changed = {**BASE, name: made.noisy({name: BASE[name]}, 0.01)[name]}
        relation = prove(adapter(BASE), adapter(cast(changed, dtype)))
        assert relation is not None and relation.grade == "near"
        scaled = {**BASE, name: made.copy(BASE[name], up=BASE[name].tensors()["up"] * 1.01)}
        relation = prove(adapter(BASE), adapter(cast(scaled, dtype)))
        assert relation is not None and relation.grade in ("reweighted", "near")


def test_a_foreign_module_is_seen() -> None:
    name = list(BASE)[7]
    stranger = made.trained({name: BASE[name].shape}, 16, seed=77, alpha=8)
    relation = prove(adapter(BASE), adapter({**BASE, **stranger}))
    assert relation is not None and relation.grade == "near"


def test_the_null_is_not_too_narrow() -> None:
    ratios = []
    for seed in range(60):
        shapes = made.layout(24, 20, 16)
        same_a = 5 if seed % 2 else None
        x = made.trained(shapes, 4, seed=2 * seed, seed_a=same_a)
        y = made.trained(shapes, 4, seed=2 * seed + 1, seed_a=same_a)
        found = Evidence(adapter(x), adapter(y))
        ratios.append(found.cosine / found.chance)
    size = torch.tensor(ratios)
    assert float(size.square().mean().sqrt()) < 1.3
    assert float(size.abs().max()) < 5


def test_zero_is_related_to_nothing() -> None:
    zero = {name: made.copy(d, up=d.tensors()["up"] * 0) for name, d in BASE.items()}
    assert prove(adapter(BASE), adapter(zero)) is None
    assert prove(adapter(zero), adapter(BASE)) is None


def test_other_shapes_under_one_name_are_not_compared() -> None:
    y = made.trained(made.layout(40), 16, alpha=8)
    assert prove(adapter(BASE), adapter(y)) is None
