"""ΔW of every family against the formula, computed here in float64 from the stored numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafind.formats.read import Reading, read

NAME = "lora_unet_net_0_layer"
G = torch.Generator().manual_seed(7)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def written(tmp_path: Path, parts: dict[str, Tensor], **metadata: str) -> Reading:
    path = tmp_path / "x.safetensors"
    save_file({f"{NAME}.{k}": t for k, t in parts.items()}, path, metadata or None)
    return read(path)


def dense(reading: Reading, name: str = "model/net_0_layer") -> np.ndarray:
    assert reading.adapter is not None, reading.reason
    return reading.adapter.modules[name].dense().numpy()


def f64(t: Tensor) -> np.ndarray:
    return t.double().numpy()


def check(reading: Reading, expected: np.ndarray, family: str, rank: int) -> None:
    assert reading.outcome == "lora" and reading.plan is not None
    (module,) = reading.plan.modules
    o = expected.shape[0]
    assert module.family == family
    assert module.rank == rank
    assert module.shape == (o, expected.size // o)
    np.testing.assert_allclose(dense(reading), expected.reshape(o, -1), rtol=1e-12, atol=1e-12)
    assert not reading.plan.unknown_keys


def test_lora(tmp_path: Path) -> None:
    up, down = rand(6, 3), rand(3, 5)
    reading = written(
        tmp_path, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.5)}
    )
    check(reading, 0.5 * np.einsum("or,ri->oi", f64(up), f64(down)), "lora", 3)


@pytest.mark.parametrize("kernel", [1, 3])
def test_locon(tmp_path: Path, kernel: int) -> None:
    up, down = rand(6, 2, 1, 1), rand(2, 4, kernel, kernel)
    reading = written(
        tmp_path, {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4)}
    )
    check(reading, 2 * np.einsum("orab,rikl->oikl", f64(up), f64(down)), "lora", 2)
    assert reading.plan is not None
    assert reading.plan.family == ("locon" if kernel > 1 else "lora")


def test_locon_tucker(tmp_path: Path) -> None:
    up, mid, down = rand(6, 3, 1, 1), rand(3, 3, 3, 3), rand(3, 4, 1, 1)
    reading = written(
        tmp_path,
        {
            "lora_up.weight": up,
            "lora_mid.weight": mid,
            "lora_down.weight": down,
            "alpha": torch.tensor([1.5]),
        },
    )
    expected = np.einsum("om,mnkl,ni->oikl", f64(up)[..., 0, 0], f64(mid), f64(down)[..., 0, 0])
    check(reading, 0.5 * expected, "lora", 3)


def test_loha(tmp_path: Path) -> None:
    parts = {f"hada_w{i}_{s}": rand(*(6, 3) if s == "a" else (3, 36)) for i in "12" for s in "ab"}
    reading = written(tmp_path, parts | {"alpha": torch.tensor(6.0)})
    one = f64(parts["hada_w1_a"]) @ f64(parts["hada_w1_b"])
    two = f64(parts["hada_w2_a"]) @ f64(parts["hada_w2_b"])
    check(reading, 2 * one * two, "loha", 3)


def test_loha_tucker(tmp_path: Path) -> None:
    parts = {f"hada_w{i}_a": rand(2, 6) for i in "12"}
    parts |= {f"hada_w{i}_b": rand(2, 4) for i in "12"}
    parts |= {f"hada_t{i}": rand(2, 2, 3, 3) for i in "12"}
    reading = written(tmp_path, parts | {"alpha": torch.tensor(1.0)})
    halves = [
        np.einsum(
            "mnkl,mo,ni->oikl",
            *(f64(parts[k]) for k in (f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")),
        )
        for i in "12"
    ]
    check(reading, 0.5 * halves[0] * halves[1], "loha", 2)


def lokr_parts(first: str, second: str) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
    parts: dict[str, Tensor] = {}
    if first == "whole":
        parts["lokr_w1"] = rand(2, 3)
        one = f64(parts["lokr_w1"])
    else:
        parts |= {"lokr_w1_a": rand(2, 5), "lokr_w1_b": rand(5, 3)}
        one = f64(parts["lokr_w1_a"]) @ f64(parts["lokr_w1_b"])
    if second == "whole":
        parts["lokr_w2"] = rand(4, 7)
        two = f64(parts["lokr_w2"])
    elif second == "conv":
        parts["lokr_w2"] = rand(4, 7, 3, 3)
        two = f64(parts["lokr_w2"])
    elif second == "factored":
        parts |= {"lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 7)}
        two = f64(parts["lokr_w2_a"]) @ f64(parts["lokr_w2_b"])
    else:
        parts |= {"lokr_w2_a": rand(2, 4), "lokr_w2_b": rand(2, 7), "lokr_t2": rand(2, 2, 3, 3)}
        two = np.einsum(
            "mnkl,mb,nd->bdkl",
            *(f64(parts[k]) for k in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")),
        )
    return parts, one, two


@pytest.mark.parametrize("first", ["whole", "factored"])
@pytest.mark.parametrize("second", ["whole", "conv", "factored", "tucker"])
def test_lokr(tmp_path: Path, first: str, second: str) -> None:
    """The scale is α over the rank of w2, else of w1; 1 where both are whole."""
    parts, one, two = lokr_parts(first, second)
    reading = written(tmp_path, parts | {"alpha": torch.tensor(3.0)})
    rank = 2 if second in ("factored", "tucker") else 5 if first == "factored" else None
    one = one.reshape(one.shape + (1,) * (two.ndim - 2))
    expected = np.kron(one, two) * (1.0 if rank is None else 3.0 / rank)
    check(reading, expected, "lokr", rank or min(8, 21 if second == "whole" else 8))


def test_full_ignores_alpha(tmp_path: Path) -> None:
    diff, bias = rand(6, 4, 3, 3), rand(6)
    reading = written(tmp_path, {"diff": diff, "diff_b": bias, "alpha": torch.tensor(99.0)})
    assert reading.plan is not None and reading.adapter is not None
    assert reading.plan.family == "full"
    np.testing.assert_array_equal(dense(reading), f64(diff).reshape(6, -1))
    np.testing.assert_array_equal(dense(reading, "model/net_0_layer.bias"), f64(bias).reshape(6, 1))
    vectors = {m.name: m.place.vector for m in reading.plan.modules}
    assert vectors == {"model/net_0_layer": False, "model/net_0_layer.bias": True}
    assert not reading.plan.unknown_keys


def test_norms(tmp_path: Path) -> None:
    weight, bias = rand(320), rand(320)
    stem = "lora_unet_down_blocks_0_resnets_0_norm1"
    other = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{stem}.w_norm": weight,
            f"{stem}.b_norm": bias,
            f"{other}.lora_up.weight": rand(320, 2),
            f"{other}.lora_down.weight": rand(2, 768),
        },
        tmp_path / "x.safetensors",
    )
    reading = read(tmp_path / "x.safetensors")
    assert reading.plan is not None and reading.plan.architecture == "sd1"
    name = "unet/down_blocks.0.resnets.0.norm1"
    np.testing.assert_array_equal(dense(reading, f"{name}.weight")[:, 0], f64(weight))
    np.testing.assert_array_equal(dense(reading, f"{name}.bias")[:, 0], f64(bias))


def test_peft_bias_is_scaled_as_its_module(tmp_path: Path) -> None:
    up, down, bias = rand(6, 2), rand(2, 4), rand(6)
    parts = {"lora_B.weight": up, "lora_B.bias": bias, "lora_A.weight": down}
    reading = written(tmp_path, parts | {"alpha": torch.tensor(8.0)})
    np.testing.assert_allclose(dense(reading, "model/net_0_layer.bias")[:, 0], 4 * f64(bias))


def test_embedding_lora_is_transposed(tmp_path: Path) -> None:
    a, b = rand(2, 50), rand(8, 2)
    save_file(
        {"base_model.model.wte.lora_embedding_A": a, "base_model.model.wte.lora_embedding_B": b},
        tmp_path / "x.safetensors",
    )
    reading = read(tmp_path / "x.safetensors")
    np.testing.assert_allclose(dense(reading, "model/wte"), (f64(b) @ f64(a)).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [torch.int64, torch.float16])
def test_dtypes_of_weights_and_alpha(
    tmp_path: Path, dtype: torch.dtype, alpha: torch.dtype
) -> None:
    up, down = rand(6, 4).to(dtype), rand(4, 5).to(dtype)
    reading = written(
        tmp_path,
        {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2, dtype=alpha)},
    )
    check(reading, 0.5 * f64(up) @ f64(down), "lora", 4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    up, down = rand(6, 4).to(dtype), rand(4, 5).to(dtype)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0).to(dtype)}
    reading = written(tmp_path, parts)
    check(reading, 0.5 * f64(up) @ f64(down), "lora", 4)
    assert reading.adapter is not None
    assert reading.adapter.dtype == {4: "F8_E4M3", 5: "F8_E5M2"}[4 if "e4" in str(dtype) else 5]


def test_missing_alpha_is_scale_one_and_zero_means_the_rank(tmp_path: Path) -> None:
    up, down = rand(6, 4), rand(4, 5)
    parts = {"lora_up.weight": up, "lora_down.weight": down}
    check(written(tmp_path, parts), f64(up) @ f64(down), "lora", 4)
    reading = written(tmp_path, parts | {"alpha": torch.tensor(0.0)})
    check(reading, f64(up) @ f64(down), "lora", 4)
    assert reading.plan is not None and any("alpha is 0" in note for note in reading.plan.notes)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"net.0.layer": 1}}, 0.25),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"net\.\d+\.layer": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"0": 1}}, 2.0),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"layer": 4}}, 2.0),
        ({}, 1.0),
    ],
)
@pytest.mark.parametrize("where", ["adapter_config", "metadata"])
def test_peft_configuration(
    tmp_path: Path, settings: dict[str, object], scale: float, where: str
) -> None:
    up, down = rand(6, 4), rand(4, 5)
    stem = "base_model.model.net.0.layer" if where == "adapter_config" else "unet.net.0.layer"
    metadata = None
    if where == "adapter_config":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        text = json.dumps({f"unet.{k}": v for k, v in settings.items()})
        metadata = {"lora_adapter_metadata": text}
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path, metadata)
    np.testing.assert_allclose(dense(read(path)), scale * f64(up) @ f64(down), rtol=1e-12)


def test_peft_lokr_of_whole_factors_is_scaled(tmp_path: Path) -> None:
    one, two = rand(2, 3), rand(4, 5)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "alpha": 8}))
    path = tmp_path / "adapter_model.safetensors"
    stem = "base_model.model.net.0.layer"
    save_file({f"{stem}.lokr_w1": one, f"{stem}.lokr_w2": two}, path)
    np.testing.assert_allclose(dense(read(path)), 2 * np.kron(f64(one), f64(two)), rtol=1e-12)


def test_the_same_weights_with_other_settings_are_planned_anew(tmp_path: Path) -> None:
    """Plans are cached by the tensors: the scale must be part of the key."""
    up, down = rand(6, 4), rand(4, 5)
    stem = "base_model.model.net.0.layer"
    for alpha in (4, 12):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        path = folder / "adapter_model.safetensors"
        save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path)
        expected = alpha / 4 * f64(up) @ f64(down)
        np.testing.assert_allclose(dense(read(path)), expected, rtol=1e-12)


def test_dora_keeps_the_magnitude_apart(tmp_path: Path) -> None:
    up, down, magnitude = rand(6, 4), rand(4, 5), rand(6, 1)
    reading = written(
        tmp_path, {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
    )
    assert reading.plan is not None and reading.adapter is not None
    assert reading.plan.family == "dora"
    assert not reading.plan.unknown_keys
    (name,) = reading.plan.extras
    torch.testing.assert_close(reading.adapter.extra(name), magnitude)
    np.testing.assert_allclose(dense(reading), f64(up) @ f64(down), rtol=1e-12)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up.weight": (6, 3), "lora_down.weight": (4, 5)},
        {"lora_up.weight": (6, 0), "lora_down.weight": (0, 5)},
        {"lora_up.weight": (6,), "lora_down.weight": (1, 5)},
        {
            "lora_up.weight": (6, 3, 1, 1),
            "lora_down.weight": (3, 5, 1, 1),
            "lora_mid.weight": (4, 3, 3, 3),
        },
        {"hada_w1_a": (6, 3), "hada_w1_b": (3, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 4)},
        {"hada_w1_a": (6, 3), "hada_w1_b": (2, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (2, 5)},
        {"lokr_w1": (2,), "lokr_w2": (4, 3)},
        {"lora_up.weight": (6, 3), "lora_down.weight": (3, 5), "alpha": (2,)},
    ],
)
def test_contradictions_are_invalid(tmp_path: Path, parts: dict[str, tuple[int, ...]]) -> None:
    reading = written(tmp_path, {k: rand(*shape) for k, shape in parts.items()})
    assert reading.outcome == "invalid"
    assert NAME in reading.reason


@pytest.mark.parametrize(
    ("parts", "family"),
    [
        ({"vblora_logits_A": (4, 2, 2)}, "VB-LoRA"),
        ({"unilora_theta_d": (4,)}, "UniLoRA"),
        ({"lambda_layer": (1, 2), "lora_A": (2, 4), "lora_B": (4, 2)}, "T-LoRA"),
    ],
)
def test_families_that_are_not_read_are_named(
    tmp_path: Path, parts: dict[str, tuple[int, ...]], family: str
) -> None:
    reading = written(tmp_path, {k: rand(*shape) for k, shape in parts.items()})
    assert reading.outcome == "unsupported"
    assert family in reading.reason


def test_values_decide_zero_and_invalid(tmp_path: Path) -> None:
    up, down = rand(6, 3), rand(3, 5)
    parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    assert written(tmp_path, parts | {"lora_up.weight": torch.zeros(6, 3)}).outcome == "zero"
    for value in (math.nan, math.inf, -math.inf):
        for role in ("lora_up.weight", "alpha"):
            bad = parts[role].clone()
            bad.view(-1)[-1] = value
            reading = written(tmp_path, parts | {role: bad})
            assert reading.outcome == "invalid", (role, value)
            assert "model/net_0_layer" in reading.reason
