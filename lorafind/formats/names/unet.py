"""The U-Nets of SD1.x, SD2.x, SDXL and the SDXL refiner: every layer, by its two names.

Structure: diffusers ``UNet2DConditionModel`` with the configurations of the published models;
the second name of a block is that of the original code (SGM: ``input_blocks`` …).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from lorafind.formats.names import table
from lorafind.formats.names.table import Entry, Index, Shape


@dataclass(frozen=True)
class UNet:
    """What tells one U-Net from another.

    channels: of each level. down, middle, up: transformer blocks per attention of each level in
    the order of ``down_blocks`` and ``up_blocks``, 0 where a level has no attention.
    context: width of the prompt's vectors. time: width of the time embedding. added: width of the
    added conditions, 0 for none. conv_projection: proj_in and proj_out are 1 × 1 convolutions.
    """

    channels: tuple[int, ...]
    down: tuple[int, ...]
    middle: int
    up: tuple[int, ...]
    context: int
    time: int = 1280
    added: int = 0
    conv_projection: bool = False


UNETS = {
    "sd1": UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, (0, 1, 1, 1), 768, conv_projection=True),
    "sd2": UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1, (0, 1, 1, 1), 1024),
    "sdxl": UNet((320, 640, 1280), (0, 2, 10), 10, (10, 2, 0), 2048, added=2816),
    "sdxl-refiner": UNet(
        (384, 768, 1536, 1536), (0, 4, 4, 0), 4, (0, 4, 4, 0), 1280, time=1536, added=2560
    ),
}

#: Layers of a resnet and their names in the original code.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Layer:
    """path: diffusers name; sgm: original name; shape (o, n)."""

    path: str
    sgm: str
    shape: Shape
    norm: bool = False


def layers(net: UNet) -> Iterator[Layer]:
    """Every layer with a weight, in the order of the forward pass."""
    first, last = net.channels[0], len(net.channels) - 1
    yield Layer("conv_in", "input_blocks.0.0", (first, 4 * 9))
    yield Layer("time_embedding.linear_1", "time_embed.0", (net.time, first))
    yield Layer("time_embedding.linear_2", "time_embed.2", (net.time, net.time))
    if net.added:
        yield Layer("add_embedding.linear_1", "label_emb.0.0", (net.time, net.added))
        yield Layer("add_embedding.linear_2", "label_emb.0.2", (net.time, net.time))
    skips = [first]
    width = first
    for level, channels in enumerate(net.channels):
        for b in range(2):
            path, sgm = f"down_blocks.{level}", f"input_blocks.{3 * level + b + 1}"
            yield from resnet(f"{path}.resnets.{b}", f"{sgm}.0", width, channels, net)
            depth = net.down[level]
            yield from attention(f"{path}.attentions.{b}", f"{sgm}.1", channels, depth, net)
            width = channels
            skips.append(width)
        if level < last:
            sgm = f"input_blocks.{3 * level + 3}.0.op"
            yield sampler(f"down_blocks.{level}.downsamplers.0.conv", sgm, width)
            skips.append(width)
    yield from resnet("mid_block.resnets.0", "middle_block.0", width, width, net)
    yield from attention("mid_block.attentions.0", "middle_block.1", width, net.middle, net)
    yield from resnet("mid_block.resnets.1", "middle_block.2", width, width, net)
    for level, channels in enumerate(reversed(net.channels)):
        depth = net.up[level]
        for b in range(3):
            path, sgm = f"up_blocks.{level}", f"output_blocks.{3 * level + b}"
            wide = width + skips.pop()
            yield from resnet(f"{path}.resnets.{b}", f"{sgm}.0", wide, channels, net)
            yield from attention(f"{path}.attentions.{b}", f"{sgm}.1", channels, depth, net)
            width = channels
        if level < last:
            sgm = f"output_blocks.{3 * level + 2}.{2 if depth else 1}.conv"
            yield sampler(f"up_blocks.{level}.upsamplers.0.conv", sgm, width)
    yield Layer("conv_norm_out", "out.0", (width, 1), norm=True)
    yield Layer("conv_out", "out.2", (4, width * 9))


def resnet(path: str, sgm: str, wide: int, channels: int, net: UNet) -> Iterator[Layer]:
    """A residual block from ``wide`` to ``channels``."""
    shapes: dict[str, Shape] = {
        "norm1": (wide, 1),
        "conv1": (channels, wide * 9),
        "time_emb_proj": (channels, net.time),
        "norm2": (channels, 1),
        "conv2": (channels, channels * 9),
    }
    if wide != channels:
        shapes["conv_shortcut"] = (channels, wide)
    for name, shape in shapes.items():
        yield Layer(f"{path}.{name}", f"{sgm}.{RESNET[name]}", shape, name.startswith("norm"))


def attention(path: str, sgm: str, c: int, depth: int, net: UNet) -> Iterator[Layer]:
    """``depth`` transformer blocks of width ``c`` between two projections; none for depth 0."""
    if not depth:
        return
    found: dict[str, Shape] = {"norm": (c, 1), "proj_in": (c, c)}
    for t in range(depth):
        block = f"transformer_blocks.{t}"
        for attn, context in (("attn1", c), ("attn2", net.context)):
            found[f"{block}.{attn}.to_q"] = (c, c)
            found[f"{block}.{attn}.to_k"] = (c, context)
            found[f"{block}.{attn}.to_v"] = (c, context)
            found[f"{block}.{attn}.to_out.0"] = (c, c)
        found[f"{block}.ff.net.0.proj"] = (8 * c, c)
        found[f"{block}.ff.net.2"] = (c, 4 * c)
        found |= {f"{block}.norm{i}": (c, 1) for i in (1, 2, 3)}
    found["proj_out"] = (c, c)
    for name, shape in found.items():
        yield Layer(f"{path}.{name}", f"{sgm}.{name}", shape, "norm" in name)


def sampler(path: str, sgm: str, c: int) -> Layer:
    """The convolution that halves or doubles the picture."""
    return Layer(path, sgm, (c, c * 9))


@cache
def index() -> Index:
    """All names of all U-Nets, diffusers and SGM, flattened."""
    found = Index()
    for owner, net in UNETS.items():
        for layer in layers(net):
            parts = (table.Layer(layer.path, layer.shape, layer.norm),)
            names = [layer.path]
            if layer.path.endswith("to_out.0"):
                names.append(layer.path.removesuffix(".0"))
            found.add(Entry(owner, "unet", parts), names)
            found.add(Entry(owner, "unet", parts, "sgm"), [layer.sgm])
    return found
