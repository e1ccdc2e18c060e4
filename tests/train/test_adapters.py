"""What is put into the U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorafind.train.adapters import Adapters, inject
from lorafind.train.model import lora_layers
from lorafind.train.parallel import AdaptedLinear
from tests.train import tiny

GROUPS = ("self_attn", "cross_attn", "ff")


@pytest.fixture(scope="module")
def unet() -> Any:
    """The tiny U-Net; tests take out what they put in."""
    return tiny.pipeline().unet


def put(unet: Any, seeds: list[int], groups: tuple[str, ...] = GROUPS) -> Adapters:
    """LoRAs of rank 4."""
    return inject(unet, lora_layers(unet, groups), 4, 2.0, seeds)


def test_trained_parameters(unet: Any) -> None:
    """All 160 layers, A and B in float32, and nothing else."""
    adapters = put(unet, [0])
    trained = {n: p for n, p in unet.named_parameters() if p.requires_grad}
    adapters.remove()
    assert len(adapters.names) == tiny.LAYERS
    assert len(trained) == 2 * tiny.LAYERS
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == adapters.values.shape[1]
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_layers_are_peft_layers(unet: Any) -> None:
    """One LoRA alone is PEFT's, so that PEFT and diffusers know it."""
    from peft.tuners.lora import Linear
    from peft.utils import get_peft_model_state_dict

    adapters = put(unet, [0])
    layers = [unet.get_submodule(name) for name in adapters.names]
    state = get_peft_model_state_dict(unet)
    factors = adapters.factors(adapters.values[0])
    adapters.remove()
    assert all(isinstance(layer, Linear) for layer in layers)
    assert {layer.scaling["default"] for layer in layers} == {0.5}
    assert len(state) == 2 * tiny.LAYERS
    for name, a, b in factors:
        assert torch.equal(state[f"{name}.lora_A.weight"], a)
        assert torch.equal(state[f"{name}.lora_B.weight"], b)


def test_start(unet: Any) -> None:
    """A is uniform within ±1/√i, and fills it; B is 0."""
    adapters = put(unet, [3])
    adapters.remove()
    filled = []
    for name, a, b in adapters.factors(adapters.values[0]):
        bound = a.shape[1] ** -0.5
        assert float(a.abs().max()) <= bound, name
        filled.append(float(a.std() / bound))
        assert not b.any()
    assert sum(filled) / len(filled) == pytest.approx(3**-0.5, rel=0.02)


def test_start_hangs_on_seed_and_name_alone(unet: Any) -> None:
    """Whatever else is trained beside it, and whatever torch drew before."""
    torch.manual_seed(1)
    many = put(unet, [5, 6, 7])
    many.remove()
    before = torch.get_rng_state()
    alone = put(unet, [6], ("ff",))
    alone.remove()
    assert torch.equal(torch.get_rng_state(), before)
    beside = {name: a for name, a, _ in many.factors(many.values[1])}
    for name, a, _ in alone.factors(alone.values[0]):
        assert torch.equal(a, beside[name])
    rows = many.values.unique(dim=0)
    assert len(rows) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 5, 7), (6, 7), (6, 2, 3, 7)])
def test_adapted_linear(shape: tuple[int, ...], bias: bool) -> None:
    """Value and all derivatives against plain operations, in float64."""
    random = torch.Generator().manual_seed(0)

    def made(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    x, a, b = made(*shape), made(3, 2, 7), made(3, 4, 2)
    base = nn.Linear(7, 4, bias=bias, dtype=torch.float64).requires_grad_(False)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    found = AdaptedLinear.apply(x, base.weight, base.bias, a, b, 0.7)
    wanted = torch.stack(
        [
            base(x[2 * j : 2 * j + 2]) + 0.7 * (x[2 * j : 2 * j + 2] @ a[j].T) @ b[j].T
            for j in range(3)
        ]
    ).reshape(found.shape)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    weight = made(*found.shape)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_only_one(unet: Any) -> None:
    """A batch of any size through one LoRA of several is that through it alone."""
    random = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 8, 8, generator=random)
    prompts = torch.randn(1, 77, tiny.CONTEXT, generator=random)
    many = put(unet, [5, 6])
    many.values.copy_(torch.randn(many.values.shape, generator=random) / 30)
    with torch.no_grad(), many.only(1):
        found = unet(noisy, 10, prompts).sample
    row = many.values[1].clone()
    many.remove()
    with torch.no_grad():
        bare = unet(noisy, 10, prompts).sample
    alone = put(unet, [6])
    alone.values[0] = row
    with torch.no_grad():
        wanted = unet(noisy, 10, prompts).sample
    alone.remove()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)
    assert (found - bare).abs().max() > 1e-3


def test_half_precision_keeps_the_lora_in_float32() -> None:
    """The frozen part computes in bf16, the LoRA and its gradients are float32."""
    layer = nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    adapters = inject(model, ["0"], 2, 2.0, [0])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = model(x)
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert adapters.values.dtype is adapters.gradients.dtype is torch.float32
    _, a, b = adapters.factors(adapters.gradients[0])[0]
    assert not a.any()
    low = adapters.factors(adapters.values[0])[0].a
    wanted = (x.float() @ low.T).sum(0)
    assert torch.allclose(b, wanted.expand(8, 2), rtol=0.02, atol=1e-3)


def test_only_linear_layers() -> None:
    """A convolution is refused before anything is changed."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match="no linear layer"):
        inject(model, ["0"], 2, 2.0, [0])
