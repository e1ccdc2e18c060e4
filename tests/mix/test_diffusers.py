"""The merged file in diffusers against diffusers' own sum of the single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lorafind.formats.read import open_adapter
from lorafind.mix.merge import merge
from lorafind.mix.total import Term

pytest.importorskip("diffusers")
pytest.importorskip("peft")


def drawn(unet: nn.Module, seed: int, rank: int) -> dict[str, torch.Tensor]:
    """A LoRA of the attention of a U-Net, kohya's names, alpha half of its rank."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and (".attn1.to_" in name or ".attn2.to_" in name):
            stem = f"lora_unet_{name.replace('.', '_')}"
            o, n = layer.weight.shape
            made[f"{stem}.lora_up.weight"] = torch.randn(o, rank, generator=g) * 0.1
            made[f"{stem}.lora_down.weight"] = torch.randn(rank, n, generator=g) * 0.1
            made[f"{stem}.alpha"] = torch.tensor(rank / 2)
    return made


def pipeline() -> Any:
    from diffusers import StableDiffusionPipeline

    from tests.train import tiny

    fresh = tiny.pipeline()
    kind: Any = StableDiffusionPipeline
    return kind(
        vae=fresh.vae,
        text_encoder=fresh.text_encoder,
        tokenizer=fresh.tokenizer,
        unet=fresh.unet,
        scheduler=fresh.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def predicted(unet: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    size = unet.config.sample_size
    x = torch.randn(1, unet.config.in_channels, size, size, generator=g)
    words = torch.randn(1, 5, unet.config.cross_attention_dim, generator=g)
    with torch.no_grad():
        found: torch.Tensor = unet(x, 10, words).sample
    return found


def test_it_loads_and_is_the_sum(tmp_path: Path) -> None:
    weights = (0.8, -0.3)
    several = pipeline()
    bare = predicted(several.unet)
    terms = []
    for number, weight in enumerate(weights):
        path = tmp_path / f"in{number}.safetensors"
        save_file(drawn(several.unet, number, 2 + number), path)
        terms.append(Term(path.name, open_adapter(path), weight))
    for number in range(2):
        several.load_lora_weights(
            tmp_path, weight_name=f"in{number}.safetensors", adapter_name=f"in{number}"
        )
    several.set_adapters(["in0", "in1"], list(weights))
    wanted = predicted(several.unet)
    merge(terms, tmp_path / "out.safetensors")
    one = pipeline()
    one.load_lora_weights(tmp_path, weight_name="out.safetensors")
    found = predicted(one.unet)
    assert float((wanted - bare).norm() / bare.norm()) > 0.01
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)
