"""Everything that people do to a LoRA file gets its grade, with every step named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafind.formats.delta import Full, LowRank
from lorafind.relations.grades import Relation
from lorafind.relations.verify import prove
from tests.relations import made
from tests.relations.made import Modules, adapter, cast, folded, kept, resized, scaled

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

BASE = made.trained(made.layout(), 16, alpha=8)


def unet(name: str) -> bool:
    return name.startswith("unet/")


def proved(x: Modules, y: Modules, **options: Any) -> Relation:
    """The relation, which must be the same from the other side."""
    one, two = adapter(x), adapter(y, **options)
    relation, turned = prove(one, two), prove(two, one)
    assert relation is not None and turned is not None
    back = turned.swapped()
    assert (back.grade, back.dominates) == (relation.grade, relation.dominates)
    if relation.dominates[0] != relation.dominates[1]:
        assert back.larger == relation.larger
        assert [s.words for s in back.steps] == [s.words for s in relation.steps]
    return relation


def words(relation: Relation) -> list[str]:
    return [step.words for step in relation.steps]


def test_one_file() -> None:
    x = adapter(BASE)
    assert prove(x, x, same_file=True) == Relation("file", None, dominates=(True, True))


def test_tensors_in_another_order_of_keys() -> None:
    relation = proved(BASE, dict(reversed(BASE.items())))
    assert relation.grade == "tensors"
    assert relation.dominates == (True, True)
    assert relation.differs.keys() == {"metadata"}


def test_equal_tensors_whose_metadata_give_another_scale_are_scaled() -> None:
    relation = proved(BASE, scaled(BASE, 2.0))
    assert relation.grade == "scaled"


def test_another_spelling_is_weights() -> None:
    relation = proved(BASE, BASE, spelling="peft")
    assert (relation.grade, relation.larger, words(relation)) == ("weights", None, [])
    assert relation.differs == {"spelling": ["kohya", "peft"]}
    assert relation.cosine == pytest.approx(1.0, abs=1e-14)


WEIGHTS: dict[str, tuple[Modules, Modules, list[str], tuple[bool, bool]]] = {
    "F16": (BASE, cast(BASE, F16), ["F16"], (True, False)),
    "BF16": (BASE, cast(BASE, BF16), ["BF16"], (True, False)),
    "BF16 of F16": (cast(BASE, F16), cast(BASE, BF16), ["BF16"], (True, False)),
    "saved as F32 again": (cast(BASE, BF16), cast(cast(BASE, BF16), F32), [], (True, True)),
    "alpha in up": (BASE, folded(BASE, "up"), [], (True, True)),
    "alpha in down": (BASE, folded(BASE, "down"), [], (True, True)),
    "alpha in both": (BASE, folded(BASE, "both"), [], (True, True)),
    "alpha in both, F16": (BASE, cast(folded(BASE, "both"), F16), ["F16"], (True, False)),
    "refactored": (BASE, made.refactored(BASE), [], (True, True)),
    "refactored, F16": (BASE, cast(made.refactored(BASE), F16), ["F16"], (True, False)),
    "refactored at condition 1e4 in F32": (
        BASE,
        made.refactored(BASE, condition=1e4),
        [],
        (True, True),
    ),
    "orthogonal factors": (BASE, resized(BASE, lambda s: 16, F32), [], (True, True)),
}


@pytest.mark.parametrize("x, y, steps, dominates", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(x: Modules, y: Modules, steps: list[str], dominates: tuple[bool, bool]) -> None:
    relation = proved(x, y)
    assert (relation.grade, words(relation)) == ("weights", steps)
    assert relation.dominates == dominates
    assert relation.factor == 1.0
    assert relation.margin <= 1.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("rank", [1, 2, 64])
def test_weights_of_any_rank_and_width(rank: int, dtype: torch.dtype, seed: int) -> None:
    for width in (8, 24, 72):
        x = made.trained(made.layout(width, width - 3, width), rank, seed=seed, alpha=3)
        assert proved(x, cast(x, dtype)).grade == "weights"


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_weights_where_a_few_numbers_carry_everything(dtype: torch.dtype) -> None:
    x: Modules = {}
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        up = torch.randn(64, 4, generator=g) * torch.exp(1.5 * torch.randn(64, 1, generator=g))
        down = torch.randn(4, 64, generator=g) * torch.exp(1.5 * torch.randn(1, 64, generator=g))
        x[f"unet/{seed}.attn1"] = LowRank(up * 0.01, down)
    assert proved(x, cast(x, dtype)).grade == "weights"


@pytest.mark.parametrize("form", made.others())
@pytest.mark.parametrize("dtype", [F16, BF16, E4M3])
def test_every_form_may_be_cast(form: str, dtype: torch.dtype) -> None:
    x = {form: made.others()[form]}
    assert proved(x, cast(x, dtype)).grade == ("cast" if dtype == E4M3 else "weights")
    assert proved(x, scaled(x, 2.0)).grade == "scaled"


def test_full_is_weights_of_the_product() -> None:
    y: Modules = {name: Full((d.up @ d.down) * d.scale) for name, d in made.lows(BASE)}
    relation = proved(BASE, y)
    assert relation.grade == "weights"
    assert relation.dominates == (False, True)  # as the ranks are stated


CASTS: dict[str, tuple[Modules, list[str]]] = {
    "E4M3": (cast(BASE, E4M3), ["F8_E4M3"]),
    "E5M2": (cast(BASE, E5M2), ["F8_E5M2"]),
    "alpha in up": (cast(folded(BASE, "up"), E4M3), ["F8_E4M3"]),
    "alpha in down": (cast(folded(BASE, "down"), E4M3), ["F8_E4M3"]),
    "alpha in both": (cast(folded(BASE, "both"), E4M3), ["F8_E4M3"]),
    "by way of F16": (cast(cast(BASE, F16), E4M3), ["F8_E4M3"]),
    "stored as F16": (cast(cast(BASE, E4M3), F16), ["F8_E4M3"]),
}


@pytest.mark.parametrize("y, steps", CASTS.values(), ids=CASTS)
def test_cast(y: Modules, steps: list[str]) -> None:
    relation = proved(BASE, y)
    assert (relation.grade, words(relation)) == ("cast", steps)
    assert relation.dominates == (True, False)


def test_cast_across_spellings_and_shapes() -> None:
    y = {
        name: LowRank(d.up[:, :, None, None], d.down[:, :, None, None], d.scale)
        for name, d in made.lows(cast(BASE, E4M3))
    }
    assert proved(BASE, y, spelling="peft").grade == "cast"  # type: ignore[arg-type]


def test_cast_with_a_rounded_alpha() -> None:
    x = made.trained(made.layout(), 8, alpha=17)
    y = scaled(cast(x, E4M3), 16 / 17)  # F8 has no 17
    assert proved(x, y).grade == "cast"


def test_modules_that_a_cast_flushes_to_zero_are_not_dropped() -> None:
    x = dict(BASE)
    for name in list(x)[:3]:
        x[name] = made.copy(x[name], up=x[name].tensors()["up"] * 1e-4)
    relation = proved(x, cast(x, E4M3))
    assert (relation.grade, words(relation)) == ("cast", ["F8_E4M3"])
    tiny = made.copy(x[name], up=x[name].tensors()["up"] * 1e-5)
    relation = proved({**x, name: tiny}, cast({**x, name: tiny}, F16))
    assert (relation.grade, words(relation)) == ("weights", ["F16"])


def test_equal_bits_in_f8_are_weights() -> None:
    x = cast(BASE, E4M3)
    relation = proved(x, x, spelling="peft")
    assert (relation.grade, relation.dominates) == ("weights", (True, True))


@pytest.mark.parametrize("c", [0.5, -1.0, 2.0, 1.7, -0.3])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, E4M3])
def test_scaled(c: float, dtype: torch.dtype) -> None:
    relation = proved(BASE, cast(scaled(BASE, c), dtype))
    assert relation.grade == "scaled"
    assert relation.factor == pytest.approx(c, rel=1e-4)
    assert relation.steps[-1].kind == "scaled"
    assert words(relation)[-1].startswith(f"×{c:g} (")
    assert ("the opposite direction" in words(relation)[-1]) == (c < 0)
    assert f"use at ×{1 / c:.4g}" in words(relation)[-1]


def test_scaled_because_alpha_was_lost() -> None:
    y: Modules = {name: LowRank(d.up, d.down) for name, d in made.lows(BASE)}
    relation = proved(BASE, y)
    assert (relation.grade, words(relation)) == ("scaled", ["×2 (use at ×0.5)"])
    assert relation.dominates == (True, True)


def dropped(wanted: Callable[[str], bool]) -> Modules:
    return kept(BASE, wanted)


PARTS: dict[str, tuple[Modules, str]] = {
    "text encoder": (dropped(unet), "text encoder dropped"),
    "U-Net": (dropped(lambda n: not unet(n)), "U-Net dropped"),
    "convolutions": (dropped(lambda n: "resnets" not in n), "convolutions dropped"),
    "half of the blocks": (
        dropped(lambda n: "up_blocks" in n or "te1" in n),
        "21 of 47 modules dropped",
    ),
    "all but 5 %": (
        dropped(lambda n: "mid_block" in n and "attn1" in n),
        "44 of 47 modules dropped",
    ),
}


@pytest.mark.parametrize("y, expected", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("zeros", [False, True])
def test_part(y: Modules, expected: str, zeros: bool) -> None:
    share = _energy(y) / _energy(BASE)
    if zeros:  # as zero modules, which count as absent
        y = {name: y.get(name, made.copy(d, up=d.up * 0)) for name, d in made.lows(BASE)}
    relation = proved(BASE, y)
    assert (relation.grade, words(relation)) == ("part", [expected])
    assert (relation.larger, relation.dominates) == ("x", (True, False))
    assert relation.share == pytest.approx(share, rel=1e-9)
    assert relation.cosine == pytest.approx(1.0, abs=1e-14)


def _energy(modules: Modules) -> float:
    return sum(float(d.dense().square().sum()) for d in modules.values())


def test_a_small_part_is_found() -> None:
    y = PARTS["all but 5 %"][0]
    assert _energy(y) / _energy(BASE) < 0.05


def _to_rank(k: int) -> Callable[[Tensor], int]:
    return lambda s: k


RESIZES: dict[str, tuple[Callable[[Tensor], int], str]] = {
    "half": (_to_rank(8), "resized 16→8"),
    "quarter": (_to_rank(4), "resized 16→4"),
    "one": (_to_rank(1), "resized 16→1"),
    "sv_ratio": (lambda s: min(16, int((s > s[0] / 4).sum()) + 1), "resized 16→"),
    "sv_fro": (
        lambda s: min(16, int((s.square().cumsum(0) < 0.8**2 * s.square().sum()).sum()) + 1),
        "resized 16→",
    ),
    "sv_cumulative": (
        lambda s: min(16, int((s.cumsum(0) < 0.7 * s.sum()).sum()) + 1),
        "resized 16→",
    ),
}


@pytest.mark.parametrize("rule, expected", RESIZES.values(), ids=RESIZES)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_resized(rule: Callable[[Tensor], int], expected: str, dtype: torch.dtype) -> None:
    relation = proved(BASE, resized(BASE, rule, dtype))
    assert relation.grade == "resized"
    assert words(relation)[-1].startswith(expected)
    assert len(words(relation)) == (1 if dtype == F32 else 2)
    assert relation.dominates == (True, False)
    assert relation.steps[-1].values["kept"] == pytest.approx(relation.cosine**2, rel=0.2)


def test_resized_with_a_factor() -> None:
    relation = proved(BASE, scaled(resized(BASE, _to_rank(4), F16), -3.0))
    assert relation.grade == "resized"
    assert relation.factor == pytest.approx(-3.0, rel=1e-3)
    assert [step.kind for step in relation.steps] == ["dtype", "resized", "scaled"]


def test_extracted_from_a_full_difference() -> None:
    g = torch.Generator().manual_seed(3)
    x: Modules = {f"unet/{i}.attn1": Full(torch.randn(40, 56, generator=g) * 0.1) for i in range(5)}
    y: Modules = {}
    for name, d in x.items():
        u, s, vh = torch.linalg.svd(d.dense(torch.float32), full_matrices=False)
        y[name] = LowRank((u[:, :8] * s[:8]).half(), vh[:8].half())
    relation = proved(x, y)
    assert (relation.grade, words(relation)) == ("resized", ["F16", "resized 40→8"])


@pytest.mark.parametrize("dtype", [F32, F16, E4M3])
def test_reweighted(dtype: torch.dtype) -> None:
    def weight(name: str) -> float:
        return -0.3 if "up_blocks" in name else 1.0

    relation = proved(BASE, cast(scaled(BASE, weight), dtype))
    assert relation.grade == "reweighted"
    assert words(relation)[-1] == "modules reweighted ×-0.3 to ×1, some reversed"


def test_a_block_weight_of_zero_is_a_part() -> None:
    x = kept(BASE, unet)
    relation = proved(x, scaled(x, lambda n: 0.0 if "up_blocks" in n else 1.0))
    assert (relation.grade, words(relation)) == ("part", ["14 of 35 modules dropped"])


COMBINED: dict[str, tuple[Modules, str, list[str]]] = {
    "three": (
        resized(kept(BASE, unet), _to_rank(8), F16),
        "resized",
        ["F16", "text encoder dropped", "resized 16→8"],
    ),
    "four": (
        scaled(resized(kept(BASE, unet), _to_rank(8), F16), 2.0),
        "resized",
        ["F16", "text encoder dropped", "resized 16→8", "×2 (use at ×0.5)"],
    ),
    "F8, part and scaled": (
        cast(scaled(kept(BASE, unet), 2.0), E4M3),
        "part",
        ["F8_E4M3", "text encoder dropped", "×2 (use at ×0.5)"],
    ),
    "refactored, part and scaled": (
        made.refactored(scaled(kept(BASE, unet), 0.5)),
        "part",
        ["text encoder dropped", "×0.5 (use at ×2)"],
    ),
    "block weights, resized, BF16": (
        resized(scaled(BASE, lambda n: 0.25 if "mid" in n else 1.0), _to_rank(8), BF16),
        "reweighted",
        ["BF16", "resized 16→8", "modules reweighted ×0.25 to ×1"],
    ),
}


@pytest.mark.parametrize("y, grade, steps", COMBINED.values(), ids=COMBINED)
def test_several_steps_have_the_weakest_grade(y: Modules, grade: str, steps: list[str]) -> None:
    relation = proved(BASE, y)
    assert (relation.grade, words(relation)) == (grade, steps)
    assert (relation.larger, relation.dominates) == ("x", (True, False))


def test_a_better_part_does_not_go_for_a_coarser_whole() -> None:
    relation = proved(cast(BASE, BF16), kept(BASE, unet))
    assert (relation.grade, relation.larger) == ("part", "x")
    assert relation.dominates == (False, False)


def test_f16_that_runs_out_of_range_does_not_dominate_bf16() -> None:
    x: Modules = {
        name: LowRank(d.up * 5e-4, d.down, d.scale) for name, d in made.lows(kept(BASE, unet))
    }
    relation = proved(cast(x, F16), cast(x, BF16))
    assert (relation.grade, relation.dominates) == ("weights", (False, False))


def test_neither_goes_where_rank_and_precision_disagree() -> None:
    padded: Modules = {
        name: LowRank(
            torch.cat([d.up, torch.zeros_like(d.up)], 1).half(),
            torch.cat([d.down, d.down]).half(),
            d.scale,
        )
        for name, d in made.lows(BASE)
    }
    relation = proved(BASE, padded)
    assert (relation.grade, relation.dominates) == ("weights", (False, False))


@pytest.mark.parametrize(
    ("level", "cosine"), [(0.01, 0.9999), (0.1, 0.990)], ids=["noise 1 %", "noise 10 %"]
)
def test_near(level: float, cosine: float) -> None:
    relation = proved(BASE, made.noisy(BASE, level))
    assert relation.grade == "near"
    assert relation.cosine == pytest.approx(cosine, abs=5e-4)
    assert relation.dominates == (False, False)


def test_kin() -> None:
    relation = proved(BASE, made.noisy(BASE, 1.0))
    assert relation.grade == "kin"
    assert relation.cosine == pytest.approx(0.5, abs=0.05)
    assert 8 * relation.chance < relation.cosine


MAGNITUDE: Mapping[str, Tensor] = {
    name: torch.rand(d.shape[0], generator=torch.Generator().manual_seed(i)) + 0.5
    for i, (name, d) in enumerate(BASE.items())
}


def with_extras(extras: Mapping[str, Tensor], dtype: torch.dtype = F32) -> Any:
    return adapter(
        cast(BASE, dtype), extras={name: t.to(dtype) for name, t in extras.items()}, spelling="x"
    )


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_extras_may_be_cast_with_the_rest(dtype: torch.dtype) -> None:
    relation = prove(adapter(BASE, extras=MAGNITUDE), with_extras(MAGNITUDE, dtype))
    assert relation is not None and relation.grade == "weights"
    assert relation.dominates == (True, False)


def test_extras_that_are_gone_make_a_part() -> None:
    relation = prove(adapter(BASE), with_extras(MAGNITUDE))
    assert relation is not None
    assert (relation.grade, relation.larger) == ("part", "y")
    assert words(relation) == ["47 extra tensors dropped"]
    assert relation.dominates == (False, True)


def test_other_extras_bar_every_proof() -> None:
    other = {name: t * 1.01 for name, t in MAGNITUDE.items()}
    relation = prove(adapter(BASE, extras=MAGNITUDE), with_extras(other))
    assert relation is not None and relation.grade == "near"
    assert not any(relation.dominates)
    assert "extras" in relation.differs


def test_extras_of_the_smaller_adapter_bar_a_part() -> None:
    relation = prove(adapter(BASE), adapter(kept(BASE, unet), extras={"token": torch.ones(4)}))
    assert relation is not None and relation.grade == "near"


@pytest.mark.parametrize("condition", [1e3, 1e5])
def test_rounding_that_could_explain_anything_proves_nothing(condition: float) -> None:
    x, y = BASE, cast(made.refactored(BASE, condition=condition), BF16)
    relation = prove(adapter(x), adapter(y))
    assert relation is None or not relation.proved


def test_one_more_key_in_the_same_spelling() -> None:
    relation = prove(adapter(BASE), adapter(BASE, unknown={"odd": torch.ones(3)}))
    assert relation is not None and relation.grade == "weights"
    relation = prove(adapter(BASE), adapter(BASE, extras={"token": torch.ones(3)}))
    assert relation is not None and relation.grade == "part"


def test_keys_that_nobody_understands_keep_their_file() -> None:
    odd = adapter(BASE, unknown={"odd": torch.ones(3)}, spelling="x")
    relation = prove(adapter(BASE), odd)
    assert relation is not None and relation.grade == "weights"
    assert relation.dominates == (False, True)
