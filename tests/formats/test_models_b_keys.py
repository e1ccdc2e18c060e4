"""Tables of names against lists of keys of published files, their patterns and trainers' rules."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from lorafind.formats import keys, prefixes
from lorafind.formats.names import tables
from lorafind.formats.names.table import Shape

#: List → the tables that know its transformer and its text encoder.
LISTS = {
    "anima-dotted-peft": ("anima", ""),
    "anima-kohya-te": ("anima", "te_llm-qwen3-0.6b"),
    "krea2-native-dotted": ("krea2", ""),
    "ltxv-2b-diffusers": ("ltxv-2b", ""),
    "lumina2-kohya": ("lumina2", ""),
    "qwen-bare-diffusers": ("qwen-image", ""),
    "qwen-kohya-lokr": ("qwen-image", ""),
    "qwen-peft-default-adapter": ("qwen-image", ""),
    "wan21-14b-t2v-diffusion-pipe": ("wan-14b", ""),
    "wan22-5b-musubi": ("wan-5b", ""),
    "zimage-comfy-fused-qkv": ("z-image", ""),
    "zimage-lycoris-lokr": ("z-image", ""),
    "zimage-musubi": ("z-image", ""),
}

#: Stems whose shapes do not fit: both lists were written by hand. The prompt of Anima is 1024 wide,
#: its Qwen3 has 16 heads of 128 and a feed-forward of 3072.
UNFIT = {
    "anima-dotted-peft": {f"diffusion_model.blocks.0.cross_attn.{n}_proj" for n in "kv"},
    "anima-kohya-te": {"lora_unet_blocks_0_cross_attn_k_proj"}
    | {f"lora_te_layers_0_self_attn_{n}_proj" for n in "qo"}
    | {f"lora_te_layers_0_mlp_{n}_proj" for n in ("gate", "up", "down")},
}


def shape_of(roles: dict[str, list[int] | None]) -> Shape | None:
    """(o, n) of a module's ΔW; None where the list does not say."""
    if "down" in roles:
        down, up = roles["down"], roles["up"]
        return None if down is None or up is None else (up[0], math.prod(down[1:]))
    first, second = roles["lokr_w1"], roles["lokr_w2"]
    return None if first is None or second is None else (first[0] * second[0], first[1] * second[1])


@pytest.mark.parametrize("name", LISTS)
def test_every_stem_is_in_its_table(shared: pathlib.Path, name: str) -> None:
    owner, encoder = LISTS[name]
    listed = json.loads((shared / "loras" / "keys" / f"{name}.json").read_text())["keys"]
    modules: dict[str, dict[str, list[int] | None]] = {}
    for key, shape in listed.items():
        part = keys.split(key)
        modules.setdefault(part.stem, {})[part.role] = shape
    index = tables.index()
    unfit = set()
    for stem, roles in modules.items():
        module = prefixes.name_of(stem)
        table = encoder if module.component.startswith("te") else owner
        entry = index.get(module.flat).get(table)
        assert entry is not None, stem
        shape = shape_of(roles)
        if shape is not None and not entry.fits(shape, "weight"):
            unfit.add(stem)
    assert unfit == UNFIT.get(name, set())
