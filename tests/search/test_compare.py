"""Comparisons against dense float64 matrices, and of real files whose relation is known."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafind.files.outcome import NotAnAdapter
from lorafind.formats.names.places import place
from lorafind.search.compare import block, compare
from tests.formats import writers
from tests.search.made_files import LAYERS, make, write

FAMILIES = ("lora", "loha", "lokr", "full")
Dense = dict[str, Tensor]


def sums(x: Dense, y: Dense, names: set[str]) -> tuple[float, float, float]:
    """Σ‖X‖², Σ‖Y‖², Σ⟨X, Y⟩ over the names."""
    return (
        sum(float(x[n].square().sum()) for n in names),
        sum(float(y[n].square().sum()) for n in names),
        sum(float((x[n] * y[n]).sum()) for n in names),
    )


def norm(x: Dense, keep: Callable[[str], bool]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for n, t in x.items() if keep(n)))


def expect_part(part: dict[str, Any], x: Dense, y: Dense, keep: Callable[[str], bool]) -> None:
    """Every number of a part against the dense matrices."""
    common = {n for n in x if n in y and keep(n)}
    xx, yy, xy = sums(x, y, common)
    norms = norm(x, keep), norm(y, keep)
    assert part["common"] == len(common)
    assert part["only_a"] == sum(keep(n) for n in x) - len(common)
    assert part["only_b"] == sum(keep(n) for n in y) - len(common)
    assert (part["norm_a"], part["norm_b"]) == pytest.approx(norms, rel=1e-12)
    if not common:
        assert (part["cosine"], part["ratio"]) == (None, None)
        return
    assert part["cosine"] == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-12)
    assert part["cosine_all"] == pytest.approx(xy / (norms[0] * norms[1]), abs=1e-12)
    assert part["ratio"] == pytest.approx(math.sqrt(yy / xx), rel=1e-12)


def check(row: dict[str, Any], x: Dense, y: Dense) -> None:
    """Everything but words and relation."""
    everything = {
        **{key: row[key] for key in ("common", "cosine", "cosine_all", "ratio")},
        "norm_a": row["a"]["norm"],
        "norm_b": row["b"]["norm"],
        "only_a": len(row["a"]["only"]),
        "only_b": len(row["b"]["only"]),
    }
    expect_part(everything, x, y, lambda n: True)
    assert set(row["a"]["only"]) == x.keys() - y.keys()
    assert set(row["b"]["only"]) == y.keys() - x.keys()
    xx, yy, _ = sums(x, y, x.keys() & y.keys())
    assert row["a"]["share"] == pytest.approx(xx / norm(x, lambda n: True) ** 2)
    assert row["b"]["share"] == pytest.approx(yy / norm(y, lambda n: True) ** 2)
    for kind, of in (
        ("components", lambda n: n.partition("/")[0]),
        ("groups", lambda n: LAYERS[n][1]),
        ("blocks", lambda n: LAYERS[n][2]),
    ):
        names = [part["name"] for part in row[kind]]
        assert set(names) == {of(n) for n in x.keys() | y.keys()}
        assert len(names) == len(set(names))
        for part in row[kind]:
            members = {n for n in x.keys() | y.keys() if of(n) == part["name"]}
            expect_part(part, x, y, members.__contains__)
    expect_style(row["style"], x, y)


def expect_style(style: dict[str, Any], x: Dense, y: Dense) -> None:
    """DESIGN of the style feature: unit modules, K₀ for cross-attention and text."""
    found: dict[str, list[float]] = {}
    for name in x.keys() & y.keys():
        group = LAYERS[name][1]
        one, two = x[name], y[name]
        if group in ("cross_attn", "text"):
            eye = torch.eye(len(one), dtype=torch.float64)
            one, two = one @ one.T, two @ two.T
            one, two = (k - k.trace() / len(k) * eye for k in (one, two))
        found.setdefault(group, []).append(float((one * two).sum() / one.norm() / two.norm()))
    means = {group: sum(cosines) / len(cosines) for group, cosines in found.items()}
    assert {g: p["cosine"] for g, p in style["groups"].items()} == pytest.approx(means, abs=1e-11)
    assert {g: p["modules"] for g, p in style["groups"].items()} == {
        g: len(c) for g, c in found.items()
    }
    weights = {g: 0.25 if g == "cross_attn" else 1.0 for g in means if g != "text"}
    overall = sum(w * means[g] for g, w in weights.items()) / sum(weights.values())
    assert style["cosine"] == pytest.approx(overall, abs=1e-11)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Dense]]:
    """One file per family."""
    folder = tmp_path_factory.mktemp("families")
    found = {}
    for seed, family in enumerate(FAMILIES):
        tensors, dense = make(family, seed)
        found[family] = write(folder / f"{family}.safetensors", tensors), dense
    return found


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations_with_replacement(FAMILIES, 2)))
def test_families(made: dict[str, tuple[Path, Dense]], one: str, two: str) -> None:
    (a, x), (b, y) = made[one], made[two]
    row = compare(a, b)
    check(row, x, y)
    assert row["comparable"]
    assert (row["relation"] or {}).get("grade") == ("file" if one == two else None)


def test_ranks_and_parts(tmp_path: Path) -> None:
    names = list(LAYERS)
    tensors, x = make("lora", 1, names[:5], rank=3)
    a = write(tmp_path / "a.safetensors", tensors)
    more, y = make("lora", 2, names[2:], rank=8)
    b = write(tmp_path / "b.safetensors", more)
    row = compare(a, b)
    check(row, x, y)
    assert (row["a"]["ranks"], row["b"]["ranks"]) == ({"3": 5}, {"8": 5})
    back = compare(b, a)
    check(back, y, x)
    assert back["cosine"] == pytest.approx(row["cosine"], abs=1e-15)


def test_a_module_that_is_zero_counts_as_absent(tmp_path: Path) -> None:
    name = next(iter(LAYERS))
    tensors, x = make("lora", 1)
    tensors[f"{LAYERS[name][0]}.lora_up.weight"].zero_()
    a = write(tmp_path / "a.safetensors", tensors)
    more, y = make("lora", 2)
    b = write(tmp_path / "b.safetensors", more)
    del x[name]
    row = compare(a, b)
    check(row, x, y)
    assert row["b"]["only"] == [name]
    assert row["a"]["modules"] == len(LAYERS) - 1


def test_a_module_of_next_to_no_energy_has_next_to_no_vote(tmp_path: Path) -> None:
    layer = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
    names = [f"{layer}{leaf}" for leaf in "qkv"]
    same, faint = names[0], names[2]
    one, two = (writers.factors(dict.fromkeys(names, (320, 320)), seed=seed) for seed in (1, 2))
    two[same] = one[same]
    for factors, share in ((one, 1e-3), (two, 1e-4)):
        up, down = factors[faint]
        factors[faint] = up * share, down
    files = [
        write(tmp_path / f"{i}.safetensors", writers.kohya(f)) for i, f in enumerate((one, two))
    ]
    x, y = ({n: u.double() @ d.double() for n, (u, d) in f.items()} for f in (one, two))
    votes = []
    for dense in (x, y):
        median = sorted(float(t.norm()) for t in dense.values())[1]
        votes.append([min(1.0, float(dense[n].norm()) / (0.01 * median)) for n in names])
    assert votes[0][2] < 0.2 and votes[1][2] < 0.02
    cosines = [float((x[n] * y[n]).sum() / x[n].norm() / y[n].norm()) for n in names]
    top = sum(v * w * c for v, w, c in zip(*votes, cosines, strict=True))
    expected = top / math.sqrt(math.prod(sum(v * v for v in side) for side in votes))
    found = compare(*files)["style"]["groups"]["self_attn"]["cosine"]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("writer", [w for w, (_, feed) in writers.WRITERS.items() if feed])
def test_spellings(tmp_path: Path, writer: Callable[[writers.Factors], dict[str, Tensor]]) -> None:
    first = writers.factors(writers.SD1 | writers.TE1 | writers.FEED, rank=2, seed=1)
    second = writers.factors(writers.SD1 | writers.TE1 | writers.FEED, rank=3, seed=2)
    a = write(tmp_path / "a.safetensors", writers.kohya(first))
    b = write(tmp_path / "b.safetensors", {k: t.contiguous() for k, t in writer(second).items()})
    row = compare(a, b)
    x, y = ({n: u.double() @ d.double() for n, (u, d) in f.items()} for f in (first, second))
    xx, yy, xy = sums(x, y, set(x))
    assert row["common"] == len(x)
    assert not (row["a"]["only"] or row["b"]["only"])
    assert row["cosine"] == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-12)
    assert row["ratio"] == pytest.approx(math.sqrt(yy / xx), rel=1e-12)


def test_words_of_what_can_be_proved(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    a = write(tmp_path / "a.safetensors", tensors, {"ss_session_id": "7", "ss_sd_model_name": "m"})

    def told(name: str, other: dict[str, Tensor], **texts: str) -> dict[str, Any]:
        return compare(a, write(tmp_path / name, other, texts))

    same = told("m.safetensors", tensors, ss_session_id="7", ss_sd_model_name="m")
    assert same["words"]["Relation"].startswith("the same ")
    assert same["words"]["Training"] == "the same session"
    assert (same["same_session"], same["same_base"]) == (True, True)
    assert "the same, as the files say (m)" in same["words"]["Base model"]

    half = told("h.safetensors", {k: t.half() for k, t in tensors.items()}, ss_session_id="8")
    assert half["words"]["Relation"] == "the same LoRA: B is A, stored as F16"
    assert half["relation"]["grade"] in ("weights", "cast")
    assert (half["same_session"], half["same_base"]) == (False, None)
    turned = compare(tmp_path / "h.safetensors", a)
    assert turned["words"]["Relation"] == "the same LoRA: A is B, stored as F16"

    unet = {k: t for k, t in tensors.items() if "_te_" not in k}
    part = told("p.safetensors", unet)
    assert part["words"]["Relation"] == "one is a part of the other: B is A, text encoder dropped"
    assert "1 module only in A" in part["words"]["Modules"]

    twice = {k: t * 2 if "lora_up" in k else t for k, t in tensors.items()}
    scaled = told("s.safetensors", twice)
    assert scaled["words"]["Relation"].startswith("the same LoRA at another strength: ")
    assert scaled["ratio"] == pytest.approx(2)
    assert "2 times" in scaled["words"]["Strength"]

    stranger = told("o.safetensors", make("lora", 5)[0])
    assert stranger["relation"] is None
    assert "no common origin can be shown" in stranger["words"]["Relation"]


def test_other_base_models_are_said_first(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    a = write(tmp_path / "a.safetensors", tensors)
    wide = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": (
            torch.ones(320, 2)
        ),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (
            torch.ones(2, 1024)
        ),
    }
    row = compare(a, write(tmp_path / "b.safetensors", wide))
    assert not row["comparable"]
    assert row["words"]["Relation"].startswith("for different base models (sd1 and sd2)")
    assert (row["common"], row["cosine"], row["ratio"]) == (0, None, None)


def test_models_without_a_table_are_one_where_modules_meet(tmp_path: Path) -> None:
    def write_layers(name: str, *layers: str) -> Path:
        tensors = {}
        for layer in layers:
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.ones(2, 24)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(40, 2)
        return write(tmp_path / name, tensors)

    a = write_layers("a.safetensors", "h.0.q_proj", "h.0.fc")
    row = compare(a, write_layers("b.safetensors", "h.0.fc"))
    assert row["a"]["architecture"] != row["b"]["architecture"]
    assert (row["comparable"], row["common"]) == (True, 1)
    assert not compare(a, write_layers("c.safetensors", "g.0.fc"))["comparable"]
    assert [part["name"] for part in row["blocks"]] == ["model/h_0"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet/mid_block"),
        ("unet/up_blocks.11.resnets.2.conv1", "unet/up_blocks.11"),
        ("te1/text_model.encoder.layers.10.mlp.fc1", "te1/text_model.encoder.layers.10"),
        ("unet/conv_in", "unet/conv_in"),
        ("model/layers_12_self_attn_q_proj", "model/layers_12"),
        ("model/base2_h_3_attn", "model/base2_h_3"),
    ],
)
def test_block(name: str, expected: str) -> None:
    assert block(place(name)) == expected


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    a = write(tmp_path / "a.safetensors", tensors)
    zero = write(
        tmp_path / "z.safetensors",
        {k: t * (0 if "lora_up" in k else 1) for k, t in tensors.items()},
    )
    with pytest.raises(NotAnAdapter, match=r"z\.safetensors: its ΔW is zero") as caught:
        compare(a, zero)
    assert caught.value.outcome == "zero"
    with pytest.raises(NotAnAdapter, match=r"nothing\.safetensors"):
        compare(tmp_path / "nothing.safetensors", a)


REAL = ("sd1_diffusers_timohavdk_2100-lora", "sd1_diffusers_timohavdk_earlier-step")


def test_two_steps_of_one_real_run(shared: Path) -> None:
    a, b = (shared / "loras" / "real" / f"{name}.safetensors" for name in REAL)
    row = compare(a, b)
    assert row["cosine"] == pytest.approx(0.963118, abs=5e-7)
    assert row["cosine_all"] == row["cosine"]
    assert row["a"]["norm"] == pytest.approx(25.643507777047727, rel=1e-12)
    assert row["b"]["norm"] == pytest.approx(24.06009399664678, rel=1e-12)
    assert row["relation"]["grade"] == "kin"
    assert (row["common"], [g["name"] for g in row["groups"]]) == (128, ["self_attn", "cross_attn"])


def test_one_real_lora_in_two_spellings(shared: Path) -> None:
    folder = shared / "loras" / "real"
    other = folder / "sd1_kohya-doubled-prefix_timohavdk_new.safetensors"
    row = compare(folder / f"{REAL[0]}.safetensors", other)
    assert row["cosine"] == pytest.approx(1, abs=1e-12)
    assert row["relation"]["grade"] == "weights"
    assert row["words"]["Relation"] == "the same LoRA, spelled diffusers and kohya"


def test_the_text_half_of_a_real_lora(shared: Path) -> None:
    folder = shared / "loras" / "real"
    row = compare(
        folder / "sd1_cloneofsimo_analog_svd_rank4.safetensors",
        folder / "sd1_cloneofsimo_analog_svd_distill.text_encoder.pt",
        allow_pickle=True,
    )
    assert row["common"] == 48
    assert row["cosine"] == pytest.approx(1, abs=5e-7)
    assert row["cosine_all"] == pytest.approx(0.218282, abs=5e-7)


def test_real_lokr_trained_apart(shared: Path) -> None:
    folder = shared / "loras" / "real"
    names = (f"sd1_lycoris-lokr_smart_falcon_{n}.safetensors" for n in (4, 16))
    row = compare(*(folder / name for name in names))
    assert row["cosine"] == pytest.approx(0.00005, abs=5e-6)
    assert row["relation"] is None
    assert (row["same_session"], row["same_base"]) == (False, True)


def test_torch_is_not_needed_to_import() -> None:
    modules = "sys, lorafind.search.compare, lorafind.cli.compare"
    code = f"import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
