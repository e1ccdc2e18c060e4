"""ΔW and parameters against the modules of LyCORIS: what they add to a layer's output.

A module is made on a layer, its numbers are drawn at random, and its ``forward`` stands for the
truth: for LoHa and LoKr ``get_diff_weight`` multiplies by the scale twice, and that of a rotation
needs the weight of the layer anyway. Where the modules differ from what loaders do, the test says
so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lycoris.functional.diag_oft import get_r
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from lorafind.formats.delta import Delta
from tests.formats.one_module import close, deltas_of, forms_of, module

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 12),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(24, 12, 1),
    "conv3d": lambda: nn.Conv3d(4, 12, (3, 2, 2)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def drawn(kind: Any, layer: nn.Module, **settings: Any) -> Any:
    """A module of LyCORIS with random numbers, in float64 (rotations are single precision)."""
    made = kind("x", layer, **settings)
    if kind not in (DiagOFTModule, ButterflyOFTModule):
        made.double()
        layer.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return made


def as_tensor(t: Any) -> Tensor:
    assert isinstance(t, Tensor)
    return t.detach()


def saved(made: Any) -> dict[str, Tensor]:
    """What LyCORIS writes into a file for the module, by key."""
    state = made.custom_state_dict() or made.state_dict()
    return module({k: t.detach() for k, t in state.items() if not k.startswith("org_module")})


def added(made: Any, layer: Any) -> Tensor:
    """The weight that the module adds to the layer's: from what it does to the basis vectors."""
    weight = layer.weight
    n = weight[0].numel()
    made.org_forward = layer.forward
    if weight.dim() == 2:
        x = torch.eye(n, dtype=torch.float64)
        return as_tensor((made(x) - layer(x)).T)
    kernel = weight.shape[2:]
    layer.padding = (0,) * len(kernel)
    made.kw_dict["padding"] = layer.padding
    x = torch.eye(n, dtype=torch.float64).reshape(n, *weight.shape[1:])
    return as_tensor((made(x) - layer(x)).reshape(n, -1).T)


def check(found: Delta, made: Any, layer: nn.Module) -> None:
    # α·√r is kept in single precision.
    close(found, added(made, layer), rtol=1e-6 if getattr(made, "rs_lora", False) else 1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("settings", [{}, {"rs_lora": True}, {"use_scalar": True}])
@pytest.mark.parametrize("tucker", [False, True])
def test_locon(name: str, settings: dict[str, Any], tucker: bool) -> None:
    """With rs_lora LyCORIS saves α·√r, so that α/r gives what it trained with."""
    layer = LAYERS[name]()
    made = drawn(LoConModule, layer, lora_dim=3, alpha=2, use_tucker=tucker, **settings)
    check(deltas_of(saved(made))[""], made, layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("settings", [{}, {"rs_lora": True}, {"use_scalar": True}])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha(name: str, settings: dict[str, Any], tucker: bool) -> None:
    layer = LAYERS[name]()
    made = drawn(LohaModule, layer, lora_dim=2, alpha=3, use_tucker=tucker, **settings)
    check(deltas_of(saved(made))[""], made, layer)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dim": 2},
        {"lora_dim": 2, "rs_lora": True},
        {"lora_dim": 2, "use_scalar": True},
        {"lora_dim": 1, "decompose_both": True},
        {"lora_dim": 100, "factor": 4},
        {"full_matrix": True},
    ],
)
@pytest.mark.parametrize("tucker", [False, True])
def test_lokr(name: str, settings: dict[str, Any], tucker: bool) -> None:
    layer = LAYERS[name]()
    made = drawn(LokrModule, layer, alpha=3, use_tucker=tucker, **settings)
    found = deltas_of(saved(made))[""]
    if made.rs_lora and made.use_w1 and made.use_w2:
        # Trained with √dim, which no loader multiplies by: of whole factors the scale is 1.
        close(found.dense() * made.lora_dim**0.5, added(made, layer), rtol=1e-6)
    else:
        check(found, made, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_glora(name: str) -> None:
    """ΔW of the module is W·A + B; with rs_lora it saves α itself, and the file cannot tell."""
    layer = LAYERS[name]()
    made = drawn(GLoRAModule, layer, lora_dim=3, alpha=2)
    found = deltas_of(saved(made))
    a, b = found["glora_a"].dense(), found[""].dense()
    weight = as_tensor(layer.weight)
    through = torch.einsum("oi...,ij->oj...", weight, a).reshape(b.shape)
    close(through + b, added(made, layer), rtol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_dylora(name: str) -> None:
    """A DyLoRA file is a LoRA at its full rank, as loaders take it."""
    layer = LAYERS[name]()
    made = drawn(DyLoraModule, layer, lora_dim=4, alpha=2, block_size=2)
    state = made.custom_state_dict()
    up, down = state["lora_up.weight"].flatten(1), state["lora_down.weight"].flatten(1)
    close(deltas_of(saved(made))[""], 2 / 4 * up @ down)


def test_full() -> None:
    layer = nn.Linear(24, 12)
    made = drawn(FullModule, layer)
    state = {"diff": made.weight.detach(), "diff_b": made.bias.detach()}
    found = deltas_of(module(state))
    close(found[""], added_without_bias(made, layer))
    close(found["bias"], made.bias)


def added_without_bias(made: Any, layer: Any) -> Tensor:
    x = torch.eye(24, dtype=torch.float64)
    return as_tensor((made(x) - made(torch.zeros_like(x)) - layer(x) + layer.bias).T)


def test_norm() -> None:
    layer = nn.LayerNorm(8)
    made = drawn(NormModule, layer)
    found = deltas_of(saved(made))
    weight, bias = made.get_diff_weight()
    close(found["weight"], weight)
    close(found["bias"], bias)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("inputs", [False, True])
def test_ia3(name: str, inputs: bool) -> None:
    layer = LAYERS[name]()
    made = drawn(IA3Module, layer, train_on_input=inputs)
    (form,) = forms_of(saved(made))
    assert (form.suffix, form.parameters, form.beside) == ("ia3", True, ("on_input",))
    found = deltas_of(saved(made))["ia3"].dense()
    assert not found[:, int(not inputs)].any()
    gain = found[:, int(inputs)]
    weight = as_tensor(layer.weight)
    shape = (1, -1) if inputs else (-1, 1)
    expected = weight * gain.reshape(*shape, *(1,) * (weight.dim() - 2))
    close(expected.flatten(1), added(made, layer), rtol=1e-9)


def cayley(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_diag_oft(name: str, rescaled: bool) -> None:
    """Q of the file makes the rotation of the module: per block W' = Rᵀ·W, then the factors."""
    layer = LAYERS[name]()
    made = drawn(DiagOFTModule, layer, lora_dim=4, rescaled=rescaled)
    found = deltas_of(saved(made))
    blocks = made.oft_blocks
    q = found["oft"].dense().reshape(blocks.shape)
    # LyCORIS inverts in single precision.
    torch.testing.assert_close(cayley(q), get_r(blocks).double(), rtol=1e-4, atol=1e-5)
    weight = as_tensor(layer.weight).double().reshape(len(q), q.shape[1], -1)
    new = torch.einsum("knm,kn...->km...", cayley(q), weight).reshape(12, -1)
    assert ("oft_rescale" in found) == rescaled
    if rescaled:
        new = new * (1 + found["oft_rescale"].dense())
    diff, _ = made.get_diff_weight()
    close(new - as_tensor(layer.weight).flatten(1), diff, rtol=1e-5)


def test_boft() -> None:
    layer = nn.Linear(24, 16)
    made = drawn(ButterflyOFTModule, layer, lora_dim=4, rescaled=True)
    found = deltas_of(saved(made))
    assert found.keys() == {"boft", "boft_rescale"}
    q = found["boft"].dense().reshape(made.oft_blocks.shape)
    torch.testing.assert_close(cayley(q), made.get_r().double(), rtol=1e-4, atol=1e-5)
    close(found["boft_rescale"].dense() + 1, made.rescale)


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule, IA3Module])
def test_what_was_not_trained_is_zero(kind: Any) -> None:
    layer = nn.Linear(24, 16)
    made = kind("x", layer, lora_dim=4, rescaled=True)
    assert all(delta.is_zero for delta in deltas_of(saved(made)).values())
