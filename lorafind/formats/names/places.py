"""Where a module sits: group and half of the depth, from its canonical name alone."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from lorafind.formats.adapter import Place

#: Layers of the text encoders that we know.
LAYERS = {"te1": 12, "te": 24, "te2": 32}

CROSS = frozenset(
    {"attn2", "cross_attn", "crossattn", "cross_attention", "encoder_attn", "c_attn2"}
)
SELF = frozenset({"attn1", "attn", "attention", "selfattention", "self_attn", "self_attention"})
FEED = frozenset({"ff", "mlp", "ffn", "fc", "fc1", "fc2", "densereludense"})

OUT = frozenset({"proj", "out", "proj_out"})

LATE = ("up_block", "mid_block", "middle_block", "output_block", "decoder", "conv_out", "norm_out")
EARLY = ("down_block", "input_block", "encoder", "conv_in", "embed")

#: What stands in a transformer's blocks; all else embeds or projects.
_BLOCK = re.compile(r"(?:block|blocks|layers|refiner)\.\d+\.")
#: Where sound looks at pictures, or pictures at sound.
CROSS_MODAL = frozenset({"audio_attn", "video_attn"})

_SPLIT = re.compile(r"[._+]")
_INTEGER = re.compile(r"(?<![a-z0-9])\d+(?![a-z0-9])")


@lru_cache(maxsize=2**14)
def place(name: str, *, vector: bool = False, kernel: bool = False) -> Place:
    """The place of a canonical name ``component/path``, dotted or flattened.

    vector: it is a bias or norm difference; kernel: it convolves over more than one point.
    """
    component, _, path = name.partition("/")
    lower = path.lower()
    if component.startswith("te"):
        group = "text"
    elif component == "transformer":
        group = "other" if vector else _in_transformer(lower)
    else:
        group = _group(lower, vector, kernel)
    return Place(name, group, _late(component, lower), vector)


def _tokens(path: str) -> set[str]:
    words = _SPLIT.split(path)
    return {*words, *(f"{a}_{b}" for a, b in pairwise(words))}


def _in_transformer(path: str) -> str:
    """The group of a layer of a known transformer, by its canonical name."""
    block = _BLOCK.search(path)
    if block is None:
        return "other"
    tokens = _tokens(path[block.end() :])
    if tokens & (CROSS | CROSS_MODAL):
        return "cross_attn"
    # A single block's proj_out takes what its attention and its feed-forward layer give.
    if tokens & FEED or "feed_forward" in tokens or (path.startswith("single_") and tokens == OUT):
        return "ff"
    return "self_attn" if tokens & SELF else "other"


def _group(path: str, vector: bool, kernel: bool) -> str:
    if vector:
        return "other"
    tokens = _tokens(path)
    if tokens & CROSS:
        return "cross_attn"
    if kernel or any(token.startswith("conv") for token in tokens):
        return "conv"
    if tokens & FEED or "feed_forward" in tokens:
        return "ff"
    return "self_attn" if tokens & SELF else "other"


def _late(component: str, path: str) -> bool:
    number = _INTEGER.search(path.replace("_", "."))
    if component in LAYERS:
        if "layers" in path and number:
            return int(number[0][:9]) * 2 >= LAYERS[component]
        return "embed" not in path
    if any(word in path for word in LATE):
        return True
    if any(word in path for word in EARLY):
        return False
    return number is not None and number[0][-1] in "13579"
