"""Files whose numbers are parameters of a change of the base weight, compared with the like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafind.formats.adapter import Adapter
from lorafind.formats.read import Reading, read
from lorafind.relations.verify import prove

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PLACE = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

Parts = dict[str, Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


#: Family → what a file of it holds of one layer of 320 × 320, drawn and as it is before training.
FAMILIES: dict[str, tuple[str, Parts, Parts]] = {
    "glora": (
        NAME,
        {
            "a1.weight": rand(320, 4),
            "a2.weight": rand(4, 320, seed=1),
            "b1.weight": rand(320, 4, seed=2),
            "b2.weight": rand(4, 320, seed=3),
            "alpha": torch.tensor(2.0),
        },
        {"a2.weight": torch.zeros(4, 320), "b2.weight": torch.zeros(4, 320)},
    ),
    "ia3": (
        NAME,
        {"weight": rand(320), "on_input": torch.tensor(1)},
        {"weight": torch.zeros(320)},
    ),
    "ia3_peft": (PEFT, {"ia3_l": 1 + rand(320, 1)}, {"ia3_l": torch.ones(320, 1)}),
    "oft": (
        NAME,
        {
            "oft_blocks": rand(8, 40, 40),
            "rescale": 1 + rand(320, 1, seed=1),
            "alpha": torch.tensor(0.0),
        },
        {"oft_blocks": torch.zeros(8, 40, 40), "rescale": torch.ones(320, 1)},
    ),
    "boft": (
        NAME,
        {"oft_blocks": rand(3, 8, 40, 40), "alpha": torch.tensor(0.0)},
        {"oft_blocks": torch.zeros(3, 8, 40, 40)},
    ),
    "oft_diag": (NAME, {"oft_diag": rand(8, 40, 40)}, {"oft_diag": torch.zeros(8, 40, 40)}),
    "oft_r": (PEFT, {"oft_R.weight": rand(8, 780)}, {"oft_R.weight": torch.zeros(8, 780)}),
    "boft_r": (
        PEFT,
        {"boft_R": rand(1, 8, 40, 40), "boft_s": 1 + rand(320, 1, seed=1)},
        {"boft_R": torch.zeros(1, 8, 40, 40), "boft_s": torch.ones(320, 1)},
    ),
    "fourierft": (
        PEFT,
        {"fourierft_spectrum": rand(1000)},
        {"fourierft_spectrum": torch.zeros(1000)},
    ),
    "hra": (PEFT, {"hra_u": rand(320, 8)}, {}),
    "vera": (PEFT, {"vera_lambda_b": rand(320), "vera_lambda_d": rand(16)}, {}),
    "randlora": (PEFT, {"randlora_lambda": rand(32, 10), "randlora_gamma": rand(10, 320)}, {}),
}


def write(path: Path, family: str, changed: Parts | None = None) -> Reading:
    stem, parts, _ = FAMILIES[family]
    save_file({f"{stem}.{k}": t for k, t in {**parts, **(changed or {})}.items()}, path)
    return read(path)


def opened(reading: Reading) -> Adapter:
    assert reading.adapter is not None, reading.reason
    return reading.adapter


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_is_understood(tmp_path: Path, family: str) -> None:
    reading = write(tmp_path / "x.safetensors", family)
    assert reading.outcome == "lora"
    assert reading.plan is not None and not reading.plan.unknown_keys
    names = {module.name for module in reading.plan.modules}
    assert names and all(name.startswith(PLACE.rpartition(".")[0]) or "/" in name for name in names)
    for module, delta in opened(reading).modules.items():
        assert delta.shape == next(m.shape for m in reading.plan.modules if m.name == module)
        assert delta.is_finite() and not delta.is_zero


@pytest.mark.parametrize("family", [name for name, (_, _, zero) in FAMILIES.items() if zero])
def test_what_was_not_trained_changes_nothing(tmp_path: Path, family: str) -> None:
    assert write(tmp_path / "x.safetensors", family, FAMILIES[family][2]).outcome == "zero"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_changed_tensor_is_another_adapter(tmp_path: Path, family: str) -> None:
    """Every tensor of a module counts: no two files are one that differ in any."""
    _, parts, _ = FAMILIES[family]
    one = opened(write(tmp_path / "x.safetensors", family))
    same = opened(write(tmp_path / "same.safetensors", family))
    relation = prove(one, same)
    assert relation is not None and relation.grade == "tensors"
    for role, tensor in parts.items():
        changed = tensor.clone()
        if tensor.is_floating_point():
            changed += rand(*tensor.shape, seed=9) if tensor.dim() else 1.0
        else:
            changed = 1 - tensor
        other = opened(write(tmp_path / f"{role}.safetensors", family, {role: changed}))
        relation = prove(one, other)
        assert relation is None or relation.grade in ("near", "kin", "scaled"), (role, relation)
        if relation is not None and relation.grade == "scaled":
            assert role == "alpha"  # a scale for GLoRA


@pytest.mark.parametrize(
    "family", ["oft", "boft", "oft_r", "ia3", "ia3_peft", "fourierft", "glora"]
)
def test_a_cast_is_found(tmp_path: Path, family: str) -> None:
    one = opened(write(tmp_path / "x.safetensors", family))
    half = {k: t.half() for k, t in FAMILIES[family][1].items() if t.is_floating_point()}
    relation = prove(one, opened(write(tmp_path / "half.safetensors", family, half)))
    assert relation is not None
    assert relation.grade in ("weights", "dtype", "cast"), relation


def test_the_symmetric_part_of_blocks_does_not_act(tmp_path: Path) -> None:
    """Q = B − Bᵀ: two files with the same Q rotate alike."""
    blocks = FAMILIES["oft"][1]["oft_blocks"]
    symmetric = rand(8, 40, 40, seed=5)
    one = opened(write(tmp_path / "x.safetensors", "oft"))
    other = blocks + symmetric + symmetric.mT
    two = opened(write(tmp_path / "y.safetensors", "oft", {"oft_blocks": other}))
    torch.testing.assert_close(
        one.modules[f"{PLACE}.oft"].dense(), two.modules[f"{PLACE}.oft"].dense(), atol=1e-6, rtol=0
    )
    relation = prove(one, two)
    assert relation is not None and relation.grade == "weights"


def test_parametrisations_never_meet(tmp_path: Path) -> None:
    """The same numbers in two parametrisations are strangers."""
    blocks = FAMILIES["oft"][1]["oft_blocks"]
    for other, parts in {
        "diag": {"oft_diag": blocks},
        "butterfly": {"oft_blocks": blocks[None]},
        "peft": {"boft_R": blocks[None]},
        "old": {"oft_r": blocks},
    }.items():
        path = tmp_path / f"{other}.safetensors"
        save_file({f"{NAME}.{k}": t for k, t in parts.items()}, path)
        one = opened(write(tmp_path / "x.safetensors", "oft"))
        two = opened(read(path))
        assert not one.modules.keys() & two.modules.keys()
        assert prove(one, two) is None


def test_writers_of_ia3_meet(tmp_path: Path) -> None:
    """LyCORIS stores what PEFT stores less 1."""
    gain = rand(320)
    save_file(
        {f"{NAME}.weight": gain, f"{NAME}.on_input": torch.tensor(0)}, tmp_path / "x.safetensors"
    )
    save_file({f"{PEFT}.ia3_l": 1 + gain[:, None]}, tmp_path / "y.safetensors")
    one, two = (opened(read(tmp_path / f"{n}.safetensors")) for n in "xy")
    (x,), (y,) = one.modules.values(), two.modules.values()
    assert list(one.modules) == list(two.modules)
    torch.testing.assert_close(x.dense(), y.dense(), atol=1e-6, rtol=0)
    relation = prove(one, two)
    assert relation is not None and relation.grade == "weights"


def test_factors_of_inputs_are_not_those_of_outputs(tmp_path: Path) -> None:
    readings = []
    for flag in (0, 1):
        path = tmp_path / f"{flag}.safetensors"
        save_file({f"{NAME}.weight": rand(320), f"{NAME}.on_input": torch.tensor(flag)}, path)
        readings.append(opened(read(path)))
    assert prove(*readings) is None


def test_a_lora_is_a_part_of_the_glora_that_holds_it(tmp_path: Path) -> None:
    parts = FAMILIES["glora"][1]
    whole = opened(write(tmp_path / "x.safetensors", "glora"))
    factors = {
        f"{NAME}.lora_up.weight": parts["b1.weight"],
        f"{NAME}.lora_down.weight": parts["b2.weight"],
        f"{NAME}.alpha": parts["alpha"],
    }
    save_file(factors, tmp_path / "y.safetensors")
    part = opened(read(tmp_path / "y.safetensors"))
    torch.testing.assert_close(whole.modules[PLACE].dense(), part.modules[PLACE].dense())
    relation = prove(whole, part)
    assert relation is not None and relation.larger == "x"
    assert [step.grade for step in relation.steps] == ["part"]


def test_vera_with_its_projections_is_a_change_of_weights(tmp_path: Path) -> None:
    """A and B stand once in the file; the layer's width comes from the table of names."""
    a, b, inner, outer = rand(4, 2048), rand(1280, 4), rand(4), rand(320)
    shared = {"base_model.vera_A": a, "base_model.vera_B": b}
    widths = {PEFT: 320, PEFT.replace("attn1.to_q", "attn2.to_k"): 768}
    tensors = dict(shared)
    for stem in widths:
        tensors |= {f"{stem}.vera_lambda_b": outer.clone(), f"{stem}.vera_lambda_d": inner.clone()}
    # What tells the model, which the vectors alone do not.
    stem = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    tensors |= {f"{stem}.lora_A.weight": rand(2, 768), f"{stem}.lora_B.weight": rand(1280, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    reading = read(tmp_path / "x.safetensors")
    assert reading.plan is not None and not reading.plan.unknown_keys
    adapter = opened(reading)
    for layer, n in widths.items():
        name = f"unet/{layer.removeprefix('base_model.model.')}"
        expected = torch.diag(outer) @ b[:320] @ torch.diag(inner) @ a[:, :n]
        torch.testing.assert_close(adapter.modules[name].dense(), expected.double())


def test_weights_that_are_set(tmp_path: Path) -> None:
    """They say what the weight becomes: zero too, which is not the same as nothing."""
    lora = {f"{NAME}.lora_up.weight": rand(320, 2), f"{NAME}.lora_down.weight": rand(2, 320)}
    other = NAME.replace("to_q", "to_k")
    values = {"value": rand(320, 320), "zero": torch.zeros(320, 320)}
    save_file(lora, tmp_path / "without.safetensors")
    for name, weight in values.items():
        save_file({**lora, f"{other}.set_weight": weight}, tmp_path / f"{name}.safetensors")
    value, zero, without = (
        opened(read(tmp_path / f"{name}.safetensors")) for name in ("value", "zero", "without")
    )
    name = f"{PLACE.replace('to_q', 'to_k')}.set_weight"
    torch.testing.assert_close(value.modules[name].dense(), rand(320, 320).double())
    assert not zero.modules[name].is_zero
    for one, two in ((value, zero), (value, without), (zero, without)):
        relation = prove(one, two)
        assert relation is None or relation.grade not in ("file", "tensors", "weights")


def test_a_modulation_is_a_vector_of_its_block(tmp_path: Path) -> None:
    difference = rand(1, 6, 64)
    save_file({"diffusion_model.blocks.0.diff_m": difference}, tmp_path / "x.safetensors")
    adapter = opened(read(tmp_path / "x.safetensors"))
    ((name, delta),) = adapter.modules.items()
    assert name.endswith("blocks_0.modulation") or name.endswith("blocks.0.modulation")
    torch.testing.assert_close(delta.dense().flatten(), difference.flatten().double())
