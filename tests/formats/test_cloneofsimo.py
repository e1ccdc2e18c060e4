"""Numbered modules: the order in which torch registers them."""

from __future__ import annotations

import pytest
import torch

from lorafind.files.safetensors import TensorInfo
from lorafind.formats import cloneofsimo
from lorafind.formats.names import unet
from lorafind.formats.plan import understand


def test_text_layers_hold_k_v_q_out() -> None:
    """transformers' CLIPAttention registers them so; all have one shape, so nothing else tells."""
    found = cloneofsimo.names("text_encoder", [(768, 768)] * 48)
    assert found is not None
    assert [name.rpartition(".")[2] for name in found[:4]] == [
        *("k_proj", "v_proj", "q_proj", "out_proj")
    ]
    assert found[4] == "te1/text_model.encoder.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("count", [92, 96])
def test_sd2_has_23_or_24_text_layers(count: int) -> None:
    found = cloneofsimo.names("", [(1024, 1024)] * count)
    assert found is not None and len(set(found)) == count
    assert found[0].startswith("te/")


class Attention(torch.nn.Module):
    """The layers of a diffusers attention block in their order."""

    def __init__(self, c: int, context: int) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(c, c)
        self.to_k = torch.nn.Linear(context, c)
        self.to_v = torch.nn.Linear(context, c)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(c, c)])


@pytest.mark.parametrize("architecture", ["sd1", "sd2"])
@pytest.mark.parametrize("feed", ["between", "last", "none"])
def test_unet_order(architecture: str, feed: str) -> None:
    """Down, up, mid; every transformer block in its own order; GEGLU where its width is."""
    net = unet.UNETS[architecture]
    roots: list[tuple[str, int]] = []
    for level, channels in enumerate(net.channels[:3]):
        roots += [(f"down_blocks.{level}.attentions.{b}", channels) for b in range(2)]
    for level, channels in enumerate(reversed(net.channels[:3])):
        roots += [(f"up_blocks.{level + 1}.attentions.{b}", channels) for b in range(3)]
    roots.append(("mid_block.attentions.0", 1280))
    expected: list[tuple[str, tuple[int, int]]] = []
    with torch.device("meta"):
        for root, c in roots:
            block = f"unet/{root}.transformer_blocks.0"
            parts = {}
            for name, context in (("attn1", c), ("attn2", net.context)):
                parts[name] = [
                    (f"{block}.{name}.{leaf}", (layer.out_features, layer.in_features))
                    for leaf, layer in Attention(c, context).named_modules()
                    if isinstance(layer, torch.nn.Linear)
                ]
            geglu = [(f"{block}.ff.net.0.proj", (8 * c, c))]
            expected += parts["attn1"] + (geglu if feed == "between" else []) + parts["attn2"]
            expected += geglu if feed == "last" else []
    assert len(expected) == (128 if feed == "none" else 144)
    assert cloneofsimo.names("unet", [s for _, s in expected]) == [n for n, _ in expected]


def test_numbers_that_fit_no_model_are_still_read() -> None:
    tensors = {}
    for i in range(3):
        tensors[f"unet:{i}:up"] = TensorInfo("F16", (40 + i, 2), 0, 0)
        tensors[f"unet:{i}:down"] = TensorInfo("F16", (2, 30), 0, 0)
    plan = understand(tensors, {}, None)
    assert plan.architecture.startswith("other:")
    assert [m.shape for m in plan.modules] == [(40, 30), (41, 30), (42, 30)]
    assert plan.unknown_keys == [] and plan.notes
