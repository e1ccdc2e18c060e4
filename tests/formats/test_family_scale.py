"""The scale of a module: every way in which a file says it, or does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafind.formats.read import read
from tests.formats.one_module import deltas_of, forms_of, module

LORA = {"lora_up.weight": torch.ones(6, 4), "lora_down.weight": torch.ones(4, 5)}
HADA = {f"hada_w{i}_{s}": torch.ones((6, 4) if s == "a" else (4, 5)) for i in "12" for s in "ab"}
LOKR = {"lokr_w1": torch.ones(2, 3), "lokr_w2_a": torch.ones(3, 4), "lokr_w2_b": torch.ones(4, 5)}
WHOLE = {"lokr_w1": torch.ones(2, 3), "lokr_w2": torch.ones(3, 5)}
GLORA = {
    "a1.weight": torch.ones(5, 4),
    "a2.weight": torch.ones(4, 5),
    "b1.weight": torch.ones(6, 4),
    "b2.weight": torch.ones(4, 5),
}


@pytest.mark.parametrize("parts", [LORA, HADA, LOKR, GLORA])
@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (torch.tensor(2.0), 0.5),
        (torch.tensor([2.0]), 0.5),
        (torch.tensor(2), 0.5),
        (torch.tensor(8, dtype=torch.int32), 2.0),
        (torch.tensor(0.1, dtype=torch.float16), float(torch.tensor(0.1).half()) / 4),
        (torch.tensor(257.0, dtype=torch.bfloat16), 64.0),  # which rounds to 256
        (torch.tensor(-4.0), -1.0),
        (torch.tensor(0.0), 1.0),
        (None, 1.0),
    ],
)
def test_stored_alpha(parts: dict[str, Tensor], alpha: Tensor | None, scale: float) -> None:
    tensors = module(parts if alpha is None else {**parts, "alpha": alpha})
    for delta in deltas_of(tensors).values():
        assert delta.scale == scale
    assert all(form.scaled for form in forms_of(tensors))


@pytest.mark.parametrize("parts", [WHOLE, {"diff": torch.ones(6, 5)}])
def test_alpha_that_says_nothing(parts: dict[str, Tensor]) -> None:
    """LyCORIS forces α to the rank where both factors are whole; a difference has no scale."""
    tensors = module({**parts, "alpha": torch.tensor(7.0)})
    (form,) = forms_of(tensors)
    assert not form.scaled
    assert deltas_of(tensors)[""].scale == 1.0


@pytest.mark.parametrize("parts", [LORA, HADA, LOKR, WHOLE, GLORA])
def test_webuis_scale_wins(parts: dict[str, Tensor]) -> None:
    """``<module>.scale`` stands for α/r (stable-diffusion-webui ``extensions-builtin/Lora``)."""
    tensors = module({**parts, "alpha": torch.tensor(2.0), "scale": torch.tensor(0.75)})
    assert {delta.scale for delta in deltas_of(tensors).values()} == {0.75}
    assert all("scale" in form.beside for form in forms_of(tensors) if form.scaled)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["alpha", "scale"])
def test_a_scale_that_is_no_number_is_not_finite(role: str, value: float) -> None:
    assert not deltas_of(module({**LORA, role: torch.tensor(value)}))[""].is_finite()


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_per_module_ranks_and_alphas(tmp_path: Path, rank: int) -> None:
    """Each module has its own scale, as files of sd-scripts with block dims do."""
    tensors = {}
    for i, r in enumerate((rank, 2 * rank)):
        stem = f"lora_unet_net_{i}_layer"
        tensors[f"{stem}.lora_up.weight"] = torch.ones(6, r)
        tensors[f"{stem}.lora_down.weight"] = torch.ones(r, 5)
        tensors[f"{stem}.alpha"] = torch.tensor(float(i + 1))
    save_file(tensors, tmp_path / "x.safetensors")
    reading = read(tmp_path / "x.safetensors")
    assert reading.adapter is not None and reading.plan is not None
    bound = reading.adapter.modules
    found = sorted((m.rank, bound[m.name].scale) for m in reading.plan.modules)
    assert found == [(rank, 1 / rank), (2 * rank, 1 / rank)]


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "alpha": 2}, 0.5),
        ({"r": 16, "lora_alpha": 8}, 2.0),  # the rank of the module counts, not the default
        ({}, 1.0),
    ],
)
def test_configured_alpha(config: dict[str, object], scale: float) -> None:
    tensors = module({"lora_B.weight": torch.ones(6, 4), "lora_A.weight": torch.ones(4, 5)})
    assert deltas_of(tensors, config)[""].scale == scale
    # A stored alpha wins over the configuration.
    tensors |= module({"alpha": torch.tensor(12.0)})
    assert deltas_of(tensors, config)[""].scale == 3.0


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"lora_alpha": "8", "r": "4"}, 2.0),
        ({"lora_alpha": "8"}, 2.0),
        ({"transformer.lora_alpha": "8.0", "transformer.r": "16"}, 2.0),
        ({"network_alpha": "2"}, 0.5),
        ({"alpha": "2", "lora_alpha": "8"}, 2.0),
        ({"text_encoder.lora_alpha": "8"}, 1.0),
        ({"lora_alpha": "many"}, 1.0),
        ({"lora_alpha": "nan"}, 1.0),
        ({"r": "2"}, 1.0),
        ({"ss_network_alpha": "8"}, 1.0),  # which no program applies
        ({"lora_alpha": "8", "lora_adapter_metadata": '{"transformer.lora_alpha": 2}'}, 0.5),
    ],
)
def test_alpha_as_a_text_of_the_header(
    tmp_path: Path, metadata: dict[str, str], scale: float
) -> None:
    """SimpleTuner and LightX2V, as SGLang reads them (sgl-project/sglang #36082)."""
    stem = "transformer.net_0.layer"
    tensors = module({"lora_B.weight": torch.ones(6, 4), "lora_A.weight": torch.ones(4, 5)}, stem)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    reading = read(tmp_path / "x.safetensors")
    assert reading.adapter is not None
    (delta,) = reading.adapter.modules.values()
    assert delta.scale == scale


def test_the_bias_of_a_scaled_module_is_scaled() -> None:
    tensors = module(
        {
            "lora_B.weight": torch.ones(6, 4),
            "lora_B.bias": torch.arange(6.0),
            "lora_A.weight": torch.ones(4, 5),
            "alpha": torch.tensor(2.0),
        }
    )
    found = deltas_of(tensors)
    torch.testing.assert_close(found["bias"].dense()[:, 0], torch.arange(6.0).double() / 2)


@pytest.mark.parametrize(
    ("alpha", "ranknum", "scale"),
    [(None, None, 1.0), (6.0, None, 6 / (4 + 1e-5)), (6.0, 3.0, 6 / (3 + 1e-5))],
)
def test_adalora(alpha: float | None, ranknum: float | None, scale: float) -> None:
    tensors = module(
        {"lora_B": torch.ones(6, 4), "lora_A": torch.ones(4, 5), "lora_E": torch.ones(4, 1)}
    )
    if ranknum is not None:
        tensors |= module({"ranknum": torch.tensor(ranknum)})
    config = None if alpha is None else {"lora_alpha": alpha, "r": 8}
    found = deltas_of(tensors, config)[""]
    assert found.scale == scale
    torch.testing.assert_close(found.dense(), torch.full((6, 5), 4 * scale, dtype=torch.float64))
    if alpha is not None:  # and stored
        stored = tensors | module({"alpha": torch.tensor(alpha)})
        assert deltas_of(stored)[""].scale == scale
