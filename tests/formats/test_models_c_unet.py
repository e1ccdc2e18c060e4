"""The tables of the Stable Diffusion family against models built without weights.

Models cut from SDXL (SSD-1B, Vega, KOALA) and models of its shape (Kolors, Playground) have no
table of their own: what adapters of theirs name is in that of SDXL.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lorafind.formats.names import clip, tables, unet
from lorafind.formats.names.table import Shape, flatten

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"

FOUR: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": FOUR | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": FOUR
    | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
    | {"use_linear_projection": True},
    "sdxl": XL,
    "sdxl-refiner": XL
    | {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
        "transformer_layers_per_block": 4,
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}
SSD = {"transformer_layers_per_block": (1, 2, 4), "mid_block_type": "UNetMidBlock2D"}
VEGA = {"transformer_layers_per_block": (1, 1, 2), "mid_block_type": "UNetMidBlock2D"}
KOALA = {"layers_per_block": 1, "mid_block_type": None}
#: Name → what differs from SDXL, and the layers that the table of SDXL has in other shapes.
RELATIVES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "SSD-1B": (SSD | {"reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1)}, set()),
    "Segmind-Vega": (
        VEGA | {"reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1)},
        set(),
    ),
    # With one resnet less on each level, what comes over the skips is narrower.
    "KOALA-700M": (
        KOALA | {"transformer_layers_per_block": (1, 2, 5)},
        {
            *(f"up_blocks.{n}.resnets.1.{x}" for n in (0, 1) for x in ("conv1", "norm1")),
            *(f"up_blocks.{n}.resnets.1.conv_shortcut" for n in (0, 1)),
        },
    ),
    "KOALA-1B": (
        KOALA
        | {"transformer_layers_per_block": (1, 2, 6), "mid_block_type": "UNetMidBlock2DCrossAttn"},
        {
            *(f"up_blocks.{n}.resnets.1.{x}" for n in (0, 1) for x in ("conv1", "norm1")),
            *(f"up_blocks.{n}.resnets.1.conv_shortcut" for n in (0, 1)),
        },
    ),
    "Playground v2": ({}, set()),
    "Kolors": (
        {"projection_class_embeddings_input_dim": 5632}
        | {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"},
        {"add_embedding.linear_1", "encoder_hid_proj"},
    ),
}


def true_layers(model: torch.nn.Module) -> dict[str, tuple[Shape, bool]]:
    """Name → (o, n) and whether it is a norm; every bias has its weight."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, value in parameters.items():
        path, _, last = name.rpartition(".")
        if last == "weight":
            found[path] = (value.shape[0], math.prod(value.shape[1:])), value.ndim == 1
        else:
            assert last == "bias" and f"{path}.weight" in parameters, name
    return found


def unet_layers(config: dict[str, Any]) -> dict[str, tuple[Shape, bool]]:
    with torch.device("meta"):
        return true_layers(diffusers.UNet2DConditionModel(**config))


@pytest.mark.parametrize("owner", list(CONFIGS))
def test_names_and_shapes_are_those_of_diffusers(owner: str) -> None:
    own = {layer.path: (layer.shape, layer.norm) for layer in unet.layers(unet.UNETS[owner])}
    assert own == unet_layers(CONFIGS[owner])


@pytest.mark.parametrize("name", list(RELATIVES))
def test_relatives_of_sdxl_are_in_its_table(name: str) -> None:
    change, other = RELATIVES[name]
    own = {layer.path: (layer.shape, layer.norm) for layer in unet.layers(unet.UNETS["sdxl"])}
    theirs = unet_layers(XL | change)
    assert {path for path, found in theirs.items() if own.get(path) != found} == other


@pytest.mark.parametrize(
    ("component", "config"),
    [
        ("te1", {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}),
        ("te", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}),
        ("te2", {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}),
    ],
)
def test_text_encoders_are_those_of_transformers(component: str, config: dict[str, Any]) -> None:
    """With and without ``text_model.``, which transformers 5 leaves out in some classes."""
    width = config["hidden_size"]
    heads = {"num_attention_heads": width // 64, "projection_dim": width}
    with torch.device("meta"):
        made = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**config | heads)
        )
    theirs = true_layers(made)
    own = {path: (shape, norm) for path, shape, norm in clip.layers(component)}
    assert len(own) == len(theirs)
    for path, (shape, norm) in theirs.items():
        entry = clip.index().get(flatten(path))[component]
        assert (entry.shape, entry.parts[0].norm) == (shape, norm)
        assert own[entry.path] == (shape, norm)


@pytest.mark.parametrize(
    "name",
    [
        # AnimateDiff's motion modules, as its code and as diffusers call them.
        "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
        ".attention_blocks.0.to_q",
        "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q",
        "mid_block.motion_modules.0.transformer_blocks.0.attn1.to_q",
        # IP-Adapters count the attentions.
        "1.to_k_ip",
        "ip_adapter.1.to_v_ip",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip",
        # ControlNet-LLLite.
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        # Control-LoRA, beside the encoder's own names.
        "input_hint_block.0",
        "zero_convs.3.0",
        "middle_block_out.0",
    ],
)
def test_neighbours_are_in_no_table(name: str) -> None:
    assert not unet.index().get(flatten(name))
    assert not clip.index().get(flatten(name))
    assert not tables.index().get(flatten(name))
