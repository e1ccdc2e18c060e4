"""ΔW and parameters against PEFT: the weight that its merge makes, from what its save writes.

A model of one layer is wrapped, its adapter drawn at random, saved by PEFT's own function and
merged by PEFT. α stands in the configuration. Where PEFT differs from loaders the test says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorafind.formats import families
from tests.formats.one_module import close, deltas_of, forms_of, roles_of

STEM = "base_model.model.net.layer"

#: PEFT warns of biases, missing projections and compilers that this needs not.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 12),
    "conv": lambda: nn.Conv2d(8, 12, 3, padding=1),
}


class Holder(nn.Module):
    """One layer under the name that :data:`STEM` says."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net: Any = nn.Module()
        self.net.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found = self.net.layer(x)
        assert isinstance(found, Tensor)
        return found


class Wrapped:
    """A layer with a random adapter of PEFT: what is saved, and the weights before and after."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        torch.manual_seed(0)
        layer.double()
        self.before = {k: t.detach().clone() for k, t in layer.state_dict().items()}
        model = peft.get_peft_model(Holder(layer), config).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and not {"base_layer", "ranknum"} & set(name.split(".")):
                    parameter.copy_(torch.randn_like(parameter) / 4)
        state = peft.get_peft_model_state_dict(model)
        self.state = {k: t.detach().clone() for k, t in state.items()}
        self.config = config.to_dict()
        merged = copy.deepcopy(model).merge_and_unload()
        self.after = {k: t.detach() for k, t in merged.net.layer.state_dict().items()}

    @property
    def weight(self) -> Tensor:
        return self.before["weight"]

    @property
    def added(self) -> Tensor:
        """The change of the weight."""
        return self.after["weight"] - self.weight

    def deltas(self) -> dict[str, Any]:
        return dict(deltas_of(self.state, self.config, STEM))


def check(layer: nn.Module, config: Any, rtol: float = 1e-6) -> Wrapped:
    wrapped = Wrapped(layer, config)
    close(wrapped.deltas()[""], wrapped.added, rtol)
    return wrapped


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rs", [False, True])
def test_lora(name: str, rs: bool) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=rs, target_modules=["layer"])
    check(LAYERS[name](), config)


def test_lora_with_a_bias() -> None:
    """PEFT scales the bias as it scales ΔW."""
    config = peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=["layer"])
    wrapped = check(nn.Linear(24, 12), config)
    close(wrapped.deltas()["bias"], wrapped.after["bias"] - wrapped.before["bias"], 1e-6)


def test_lora_of_an_embedding() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["layer"])
    check(nn.Embedding(50, 12), config)


@pytest.mark.parametrize("name", LAYERS)
def test_dora(name: str) -> None:
    """The part of direction is ΔW; with the magnitude it makes PEFT's weight."""
    config = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["layer"])
    wrapped = Wrapped(LAYERS[name](), config)
    delta = wrapped.deltas()[""].dense().reshape(wrapped.weight.shape)
    roles = roles_of(wrapped.state, STEM)
    extras = families.extras(roles, forms_of(wrapped.state, wrapped.config, STEM))
    assert extras == {"dora_scale": "magnitude"}
    magnitude = wrapped.state[roles["magnitude"].key].flatten()
    turned = wrapped.weight + delta
    norm = turned.flatten(1).norm(dim=1)
    shape = (-1, *(1,) * (turned.dim() - 1))
    close((magnitude / norm).reshape(shape) * turned, wrapped.after["weight"], 1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("effective", [False, True])
def test_loha(name: str, effective: bool) -> None:
    config = peft.LoHaConfig(r=3, alpha=5, use_effective_conv2d=effective, target_modules=["layer"])
    check(LAYERS[name](), config)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2},
        {"r": 2, "use_effective_conv2d": True},
        {"r": 1, "decompose_both": True},
        {"r": 100},
        {"r": 3, "decompose_factor": 2},
    ],
)
def test_lokr(name: str, settings: dict[str, Any]) -> None:
    """PEFT scales whole factors by α/r too, which only its configuration tells."""
    check(LAYERS[name](), peft.LoKrConfig(alpha=5, target_modules=["layer"], **settings))


def test_adalora() -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["layer"]
    )
    check(nn.Linear(24, 12), config)


def test_adalora_counts_the_ranks_that_it_says() -> None:
    """Older versions save ``ranknum``, by which α is divided."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=["layer"]
    )
    wrapped = Wrapped(nn.Linear(24, 12), config)
    state = wrapped.state | {f"{STEM}.ranknum": torch.tensor(3.0)}
    (form,) = forms_of(state, wrapped.config, STEM)
    assert form.beside == ("ranknum",)
    found = deltas_of(state, wrapped.config, STEM)[""]
    close(found, wrapped.added * (4 + 1e-5) / (3 + 1e-5), 1e-6)


def test_vera() -> None:
    """Exact where A and B are in the file and the layer's width is known; else its vectors."""
    config = peft.VeraConfig(r=5, target_modules=["layer"], save_projection=True)
    wrapped = Wrapped(nn.Linear(24, 12), config)
    assert wrapped.deltas().keys() == {"vera_b", "vera_d"}
    roles = roles_of(wrapped.state, STEM)
    form = families.find_in(roles, (12, 24))
    assert form is not None and form.shape == (12, 24)
    close(form.bind(wrapped.state.__getitem__), wrapped.added, 1e-6)
    extras = families.extras(roles, families.find_all(roles, families.Scale()))
    assert extras == {"vera_A": "vera_A", "vera_B": "vera_B"}


def test_vera_in_a_narrower_layer() -> None:
    """A and B are as large as the largest layer; a smaller one takes their beginning."""
    torch.manual_seed(0)
    model = Holder(nn.Linear(24, 12))
    model.net.other = nn.Linear(30, 40)
    config = peft.VeraConfig(r=5, target_modules=["layer", "other"], save_projection=True)
    wrapped: Any = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn_like(parameter))
    state = peft.get_peft_model_state_dict(wrapped)
    assert state["base_model.vera_A"].shape == (5, 30)
    form = families.find_in(roles_of(state, STEM), (12, 24))
    assert form is not None
    before = model.net.layer.base_layer.weight.detach().clone()
    after = wrapped.merge_and_unload().net.layer.weight.detach()
    close(form.bind(state.__getitem__), after - before, 1e-6)


@pytest.mark.parametrize("shape", [(13, 24), (12, 25), (24, 12)])
def test_vera_in_a_layer_that_it_does_not_fit(shape: tuple[int, int]) -> None:
    config = peft.VeraConfig(r=5, target_modules=["layer"], save_projection=True)
    wrapped = Wrapped(nn.Linear(24, 12), config)
    assert families.find_in(roles_of(wrapped.state, STEM), shape) is None


def test_vera_without_its_projections() -> None:
    config = peft.VeraConfig(r=5, target_modules=["layer"], save_projection=False)
    wrapped = Wrapped(nn.Linear(24, 12), config)
    assert families.find_in(roles_of(wrapped.state, STEM), (12, 24)) is None
    assert wrapped.deltas().keys() == {"vera_b", "vera_d"}


@pytest.mark.parametrize("inputs", [False, True])
def test_ia3(inputs: bool) -> None:
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if inputs else []
    )
    wrapped = Wrapped(nn.Linear(24, 12), config)
    found = wrapped.deltas()["ia3"].dense()
    assert not found[:, int(not inputs)].any()
    gain = found[:, int(inputs)].reshape((1, -1) if inputs else (-1, 1))
    close(wrapped.weight * gain, wrapped.added, 1e-6)
    (form,) = forms_of(wrapped.state, stem=STEM)
    count = len(found)
    assert form.layer == ((0, count) if inputs else (count, 0))


@pytest.mark.parametrize("inputs", [False, True])
def test_ia3_of_a_convolution(inputs: bool) -> None:
    """PEFT stores [1, c, 1, 1] on either side, so that the shape does not tell which."""
    config = peft.IA3Config(
        target_modules=["layer"], feedforward_modules=["layer"] if inputs else []
    )
    wrapped = Wrapped(nn.Conv2d(8, 12, 3), config)
    (form,) = forms_of(wrapped.state, stem=STEM)
    assert (form.suffix, form.fused) == ("ia3_either", "whole")
    gain = wrapped.deltas()["ia3_either"].dense().reshape(1, -1, 1, 1)
    close(wrapped.weight * (gain if inputs else gain.reshape(-1, 1, 1, 1)), wrapped.added, 1e-6)


def neumann(q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ as PEFT approximates it, with five terms."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shared", [False, True])
def test_oft(name: str, shared: bool) -> None:
    """Q of the file makes PEFT's rotation of the inputs.

    The approximation stands for the inverse of what ``use_cayley_neumann=False`` computes from the
    same numbers, so that nothing but Q can be compared.
    """
    config = peft.OFTConfig(oft_block_size=4, r=0, block_share=shared, target_modules=["layer"])
    wrapped = Wrapped(LAYERS[name](), config)
    q = wrapped.deltas()["oft_r"].dense().reshape(-1, 4, 4)
    n = wrapped.weight[0].numel()
    blocks = neumann(q).expand(n // 4, 4, 4)
    rotation = torch.block_diag(*blocks)
    new = (rotation @ wrapped.weight.flatten(1).T).T
    close(new, wrapped.after["weight"], 1e-6)
    (form,) = forms_of(wrapped.state, stem=STEM)
    assert form.layer == (0, 0 if shared else n)


def test_oft_in_onetrainers_scale() -> None:
    """``scaled_oft``: the numbers are divided by 2·√(b − 1)."""
    plain = {f"{STEM}.oft_R.weight": torch.randn(3, 6)}
    for flag in (torch.tensor(True), torch.empty(0)):
        scaled = plain | {f"{STEM}.oft_R.scaled_oft": flag}
        one, two = (deltas_of(t, stem=STEM)["oft_r"].dense() for t in (plain, scaled))
        close(two, one / (2 * 3**0.5))


def test_boft() -> None:
    config = peft.BOFTConfig(boft_block_size=4, target_modules=["layer"])
    wrapped = Wrapped(nn.Linear(24, 12), config)
    found = wrapped.deltas()
    assert found.keys() == {"boft_r", "boft_s"}
    q = found["boft_r"].dense().reshape(-1, 4, 4)
    eye = torch.eye(4, dtype=q.dtype)
    rotation = torch.block_diag(*(torch.linalg.inv(eye + b) @ (eye - b) for b in q))
    new = (1 + found["boft_s"].dense()) * (rotation @ wrapped.weight.T).T
    close(new, wrapped.after["weight"], 1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_hra(name: str) -> None:
    config = peft.HRAConfig(r=4, target_modules=["layer"])
    wrapped = Wrapped(LAYERS[name](), config)
    u = wrapped.deltas()["hra"].dense()
    new = wrapped.weight.flatten(1)
    for column in (u / u.norm(dim=0)).T:
        new = new - 2 * torch.outer(new @ column, column)
    close(new, wrapped.after["weight"], 1e-6)


def test_fourierft() -> None:
    """The coefficients are compared; where they stand is in the configuration alone."""
    config = peft.FourierFTConfig(n_frequency=20, scaling=3.0, target_modules=["layer"])
    wrapped = Wrapped(nn.Linear(24, 12), config)
    (form,) = forms_of(wrapped.state, stem=STEM)
    assert form.parameters and form.suffix == "fourierft"
    generator = torch.Generator().manual_seed(wrapped.config["random_loc_seed"])
    places = torch.randperm(12 * 24, generator=generator)[:20]
    dense = torch.zeros(12 * 24, dtype=torch.float64)
    dense[places] = wrapped.deltas()["fourierft"].dense()[:, 0]
    close(torch.fft.ifft2(dense.reshape(12, 24)).real * 3.0, wrapped.added, 1e-5)


def test_randlora() -> None:
    config = peft.RandLoraConfig(r=4, target_modules=["layer"], save_projection=True)
    wrapped = Wrapped(nn.Linear(24, 12), config)
    found = wrapped.deltas()
    assert found.keys() == {"randlora_lambda", "randlora_gamma"}
    roles = roles_of(wrapped.state, STEM)
    forms = families.find_all(roles, families.Scale())
    assert families.extras(roles, forms).keys() == {"randlora_A", "randlora_B"}
    assert all(form.parameters for form in forms)


CONFIGS = {
    "lora": peft.LoraConfig(r=3, target_modules=["layer"], use_dora=True),
    "loha": peft.LoHaConfig(r=3, target_modules=["layer"]),
    "lokr": peft.LoKrConfig(r=3, target_modules=["layer"]),
    "adalora": peft.AdaLoraConfig(init_r=3, total_step=10, target_modules=["layer"]),
    "vera": peft.VeraConfig(r=3, target_modules=["layer"]),
    "ia3": peft.IA3Config(target_modules=["layer"], feedforward_modules=[]),
    "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=["layer"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["layer"]),
    "hra": peft.HRAConfig(r=4, target_modules=["layer"]),
    "fourierft": peft.FourierFTConfig(n_frequency=20, target_modules=["layer"]),
    "randlora": peft.RandLoraConfig(r=4, target_modules=["layer"]),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_name_of_the_adapter_can_stand_in_the_key(family: str) -> None:
    """What a model's own state dict holds says the same as what is saved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Holder(nn.Linear(24, 12)), CONFIGS[family], "mine")
    wanted = peft.get_peft_model_state_dict(model, adapter_name="mine")
    whole = {k: t for k, t in model.state_dict().items() if "base_layer" not in k}
    one, two = (deltas_of(state, stem=STEM) for state in (wanted, whole))
    assert one.keys() == two.keys()
    for suffix, delta in one.items():
        torch.testing.assert_close(two[suffix].dense(), delta.dense())
