"""The tables of names against what diffusers and transformers build."""

from __future__ import annotations

import hashlib
import json

import pytest

from lorafind.formats.names import clip, unet
from lorafind.formats.names.table import flatten

#: SHA-256 over the JSON of the sorted [name, o, n] of every weight, generated once from
#: UNet2DConditionModel (diffusers 0.42.1), CLIPTextModelWithProjection (transformers 5.23.0).
TRUE = {
    "sd1": "c96c48eea4800abaf13b0dfc880fbac2f95f0d46b7cac288655740b5706dbf73",
    "sd2": "752507a767060f61b97cbc88d446daf278318025b21a6b677c058e7b8834e2a7",
    "sdxl": "eb0e3f54aa3d61c1548f7d031a4d2b90cc2f582f04583fbd45201b1c20210673",
    "sdxl-refiner": "bf8dc5c8beab8a7324ea4b5e61da135b3a1e5a34a6b8d3cfdb258d0d49791e97",
    "te1": "2cd5ffc17193fc836750f94346637b803e1a97ddf713e2f8b2d9fdbe112a87e9",
    "te": "50862e14488a939ae74236d55884f0ded4fab73d29cf9416497f8926f9e7a9a2",
    "te2": "ab0764d747eb4f846ef7bdf75a894bd6bd3bfd7f6fc9c01267063ed72776922c",
}


def digest(rows: list[list[object]]) -> str:
    return hashlib.sha256(json.dumps(sorted(rows, key=str)).encode()).hexdigest()


@pytest.mark.parametrize("architecture", list(unet.UNETS))
def test_unet_names_and_shapes_are_those_of_diffusers(architecture: str) -> None:
    rows = [[layer.path, *layer.shape] for layer in unet.layers(unet.UNETS[architecture])]
    assert digest(rows) == TRUE[architecture]


@pytest.mark.parametrize("component", list(clip.WIDTHS))
def test_text_encoder_names_and_shapes_are_those_of_transformers(component: str) -> None:
    rows = [[path, *shape] for path, shape, _ in clip.layers(component)]
    assert digest(rows) == TRUE[component]


@pytest.mark.parametrize(
    ("architecture", "attention", "convolutions", "all_weights", "norms"),
    [
        ("sd1", 192, 278, 282, 109),
        ("sd2", 192, 278, 282, 109),
        ("sdxl", 722, 788, 794, 256),
        ("sdxl-refiner", 462, 548, 554, 188),
    ],
)
def test_module_counts(
    architecture: str, attention: int, convolutions: int, all_weights: int, norms: int
) -> None:
    """The default targets of sd-scripts, with LoCon, all, and norms."""
    layers = list(unet.layers(unet.UNETS[architecture]))
    weights = [layer.path for layer in layers if not layer.norm]
    inside = [p for p in weights if ".attentions." in p]
    blocks = [p for p in weights if ".resnets." in p or "samplers." in p]
    assert len(inside) == attention
    assert len(inside) + len(blocks) == convolutions
    assert len(weights) == all_weights
    assert len(layers) - len(weights) == norms


@pytest.mark.parametrize(("component", "count"), [("te1", 72), ("te", 144), ("te2", 192)])
def test_text_encoder_counts(component: str, count: int) -> None:
    found = [p for p, _, norm in clip.layers(component) if ".layers." in p and not norm]
    assert len(found) == count


@pytest.mark.parametrize("architecture", list(unet.UNETS))
def test_flattened_names_are_one_to_one(architecture: str) -> None:
    layers = list(unet.layers(unet.UNETS[architecture]))
    flat = {flatten(layer.path) for layer in layers}
    original = {flatten(layer.sgm) for layer in layers}
    assert len(flat) == len(original) == len(layers)
    assert not flat & original


@pytest.mark.parametrize(
    ("architecture", "original", "path"),
    [
        ("sd1", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl", "output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl-refiner", "output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
        ("sdxl-refiner", "output_blocks.8.2.conv", "up_blocks.2.upsamplers.0.conv"),
        ("sd1", "input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
        ("sd1", "middle_block.2.out_layers.3", "mid_block.resnets.1.conv2"),
        (
            "sd2",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "sdxl",
            "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj",
            "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        ),
        ("sdxl", "label_emb.0.2", "add_embedding.linear_2"),
        ("sd1", "out.2", "conv_out"),
    ],
)
def test_original_names(architecture: str, original: str, path: str) -> None:
    """Those that other converters get wrong are among them."""
    assert unet.index().get(flatten(original))[architecture].path == path
