"""The original names against diffusers' conversion of whole checkpoints.

A checkpoint in the original names is made from a table: every row of every weight holds a number of
its own, so that what diffusers makes of it shows which rows went where.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import single_file_utils as single

from lorafind.formats.names import tables

Weights = dict[str, torch.Tensor]

#: Architecture → conversion.
CONVERSIONS: dict[str, Callable[..., Weights]] = {
    "z-image": single.convert_z_image_transformer_checkpoint_to_diffusers,
    "lumina2": single.convert_lumina2_to_diffusers,
    "wan-1.3b": single.convert_wan_transformer_to_diffusers,
    "wan-5b": single.convert_wan_transformer_to_diffusers,
    "wan-14b": single.convert_wan_transformer_to_diffusers,
    "ltxv-2b": single.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltxv-13b": single.convert_ltx_transformer_checkpoint_to_diffusers,
    "ltx-2": single.convert_ltx2_transformer_to_diffusers,
    "ltx-2.3": single.convert_ltx2_transformer_to_diffusers,
    "krea2": single.convert_krea2_transformer_checkpoint_to_diffusers,
    "anima": single.convert_cosmos_transformer_checkpoint_to_diffusers,
    "cosmos-predict2-2b": single.convert_cosmos_transformer_checkpoint_to_diffusers,
    "cosmos-predict2-14b": single.convert_cosmos_transformer_checkpoint_to_diffusers,
    "cosmos1-7b": single.convert_cosmos_transformer_checkpoint_to_diffusers,
    "cosmos1-14b": single.convert_cosmos_transformer_checkpoint_to_diffusers,
}

#: Architecture → how names begin that its conversion leaves out or does not know.
NOT_CONVERTED = {
    # The conversion of the transformer alone drops what prepares the prompt, and knows LTX-2 only.
    "ltx-2": ("connectors.",),
    "ltx-2.3": ("connectors.", "prompt_adaln.", "audio_prompt_adaln."),
    "anima": ("text_conditioner.",),
}


class Kept(dict[str, torch.Tensor]):
    """A checkpoint that stays whole.

    diffusers empties it and then asks it for a name of Cosmos 1.0, which it never finds: a
    checkpoint of Cosmos 1.0 is taken for one of Cosmos-Predict2. Its own map is right.
    """

    def pop(self, name: str, *default: object) -> torch.Tensor:
        return self[name]


def suffix(owner: str, name: str, norm: bool) -> str:
    """What follows the name of a layer in a checkpoint of the original code."""
    if name.endswith("modulation") and owner.startswith("wan"):
        return ""
    return ".scale" if norm and owner == "krea2" else ".weight"


@pytest.mark.parametrize("owner", CONVERSIONS)
def test_original_names_are_those_that_diffusers_converts(owner: str) -> None:
    table = tables.tables()[owner]
    left_out = NOT_CONVERTED.get(owner, ())
    native = {name: parts for name, spelling, parts in table.names if spelling == "native"}
    fused = {part for parts in native.values() for part in parts}
    names = native | {path: (path,) for path in table.layers if path not in fused}
    prefix = "net." if owner.startswith(("anima", "cosmos")) else ""
    original: Weights = Kept() if owner.startswith("cosmos1") else {}
    expected: Weights = {}
    start = 0
    for name, parts in names.items():
        if parts[0].startswith(left_out):
            continue
        layers = [table.layers[part] for part in parts]
        rows = sum(layer.shape[0] for layer in layers)
        values = torch.arange(start, start + rows, dtype=torch.float64)
        start += rows
        norm = layers[0].norm
        original[prefix + name + suffix(owner, name, norm)] = values if norm else values[:, None]
        pieces = values.split([layer.shape[0] for layer in layers])
        for part, piece in zip(parts, pieces, strict=True):
            last = "" if part.endswith("scale_shift_table") else ".weight"
            expected[part + last] = piece if norm else piece[:, None]
    converted = CONVERSIONS[owner](original)
    assert set(converted) == set(expected)
    for path, values in expected.items():
        assert torch.equal(converted[path], values), path
