"""Where a module sits: group and half of the depth, from its canonical name alone."""

from __future__ import annotations

import re
from itertools import pairwise

from lorafind.formats.adapter import Place

#: Layers of the text encoders that we know.
LAYERS = {"te1": 12, "te": 24, "te2": 32}

CROSS = frozenset(
    {"attn2", "cross_attn", "crossattn", "cross_attention", "encoder_attn", "c_attn2"}
)
SELF = frozenset({"attn1", "attn", "attention", "selfattention", "self_attn", "self_attention"})
FEED = frozenset({"ff", "mlp", "ffn", "fc", "fc1", "fc2", "densereludense"})

LATE = ("up_block", "mid_block", "middle_block", "output_block", "decoder", "conv_out", "norm_out")
EARLY = ("down_block", "input_block", "encoder", "conv_in", "embed")

_SPLIT = re.compile(r"[._]")
_INTEGER = re.compile(r"(?<![a-z0-9])\d+(?![a-z0-9])")


def place(name: str, *, vector: bool = False, kernel: bool = False) -> Place:
    """The place of a canonical name ``component/path``, dotted or flattened.

    vector: it is a bias or norm difference; kernel: it convolves over more than one point.
    """
    component, _, path = name.partition("/")
    lower = path.lower()
    group = "text" if component.startswith("te") else _group(lower, vector, kernel)
    return Place(name, group, _late(component, lower), vector)


def _group(path: str, vector: bool, kernel: bool) -> str:
    if vector:
        return "other"
    words = _SPLIT.split(path)
    tokens = {*words, *(f"{a}_{b}" for a, b in pairwise(words))}
    if tokens & CROSS:
        return "cross_attn"
    if kernel or any(word.startswith("conv") for word in words):
        return "conv"
    if tokens & FEED or "feed_forward" in tokens:
        return "ff"
    return "self_attn" if tokens & SELF else "other"


def _late(component: str, path: str) -> bool:
    number = _INTEGER.search(path.replace("_", "."))
    if component in LAYERS:
        if "layers" in path and number:
            return int(number[0]) * 2 >= LAYERS[component]
        return "embed" not in path
    if any(word in path for word in LATE):
        return True
    if any(word in path for word in EARLY):
        return False
    return number is not None and int(number[0]) % 2 == 1
