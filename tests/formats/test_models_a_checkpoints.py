"""Original names of the Flux, HunyuanVideo, SD3 and AuraFlow families against diffusers' conversion
of whole models: a model is written in the original names, every row of it a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.loaders import single_file_utils as single

from lorafind.formats.names import tables
from lorafind.formats.names.table import Entry, flatten

Weights = dict[str, torch.Tensor]

CONVERSIONS: dict[str, Callable[..., Weights]] = {
    "flux1": single.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": single.convert_chroma_transformer_checkpoint_to_diffusers,
    **dict.fromkeys(
        ("flux2-dev", "flux2-klein-9b", "flux2-klein-4b"),
        single.convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "hunyuanvideo": single.convert_hunyuan_video_transformer_to_diffusers,
    **dict.fromkeys(
        ("sd3", "sd3.5-medium", "sd3.5-large"),
        single.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "auraflow": single.convert_auraflow_transformer_checkpoint_to_diffusers,
}

#: Models whose layers have no bias, but for these.
WITHOUT_BIAS = {
    "auraflow": ("t_embedder.mlp.0", "t_embedder.mlp.2", "init_x_linear"),
    **dict.fromkeys(("flux2-dev", "flux2-klein-9b", "flux2-klein-4b"), ()),
}

#: What the models hold besides layers.
OTHERS = {
    **dict.fromkeys(("sd3", "sd3.5-medium", "sd3.5-large"), ("pos_embed",)),
    "auraflow": ("positional_encoding", "register_tokens"),
}


def read(owner: str, values: Weights) -> Weights:
    """Canonical name → its rows, of rows under any names of a network."""
    found: Weights = {}
    for name, rows in values.items():
        entry = tables.index().get(flatten(name))[owner]
        assert rows.shape[0] == entry.shape[0], name
        for layer, start, stop in entry.cuts():
            assert layer.path not in found, layer.path
            found[layer.path] = rows[start:stop]
    return found


def original(owner: str) -> tuple[Weights, Weights]:
    """A model in the original names: weights with a column each, and biases."""
    table = tables.tables()[owner]
    names = [name for name, spelling, _ in table.names if spelling == "native"]
    names = [name for name in names if f"{name}.scale" not in names]
    reached = {layer.path for name in names for layer in entry(owner, name).parts}
    if owner == "hunyuanvideo":
        reached |= {p for p in table.layers if p.startswith(("image_proj", "clean_x_"))}
    names += sorted(set(table.layers) - reached)
    weights, biases, start = {}, {}, 0.0
    for name in names:
        count = entry(owner, name).shape[0]
        weights[name] = torch.arange(start, start + count, dtype=torch.float64)[:, None]
        norm = entry(owner, name).parts[0].norm
        if not norm and name in WITHOUT_BIAS.get(owner, (name,)):
            biases[name] = weights[name][:, 0] + 0.5
        start += count
    return weights, biases


def entry(owner: str, name: str) -> Entry:
    """What a name means in one network."""
    return tables.index().get(flatten(name))[owner]


@pytest.mark.parametrize("owner", list(CONVERSIONS))
def test_conversion_of_a_model_sends_every_row_where_we_do(owner: str) -> None:
    weights, biases = original(owner)
    checkpoint = {
        **{n if n.endswith(".scale") else f"{n}.weight": rows for n, rows in weights.items()},
        **{f"{name}.bias": rows for name, rows in biases.items()},
        **{name: torch.zeros(1) for name in OTHERS.get(owner, ())},
    }
    converted = CONVERSIONS[owner](checkpoint)
    for kind, values in ((".weight", weights), (".bias", biases)):
        ours = read(owner, values)
        theirs = read(
            owner, {k.removesuffix(kind): v for k, v in converted.items() if k.endswith(kind)}
        )
        assert ours.keys() == theirs.keys()
        assert [path for path in ours if not torch.equal(ours[path], theirs[path])] == []


def test_the_halves_of_a_modulation_are_told_apart() -> None:
    """The check above sees a swap: with the diffusers order for the original name it fails."""
    weights, _ = original("flux1")
    rows = weights["final_layer.adaLN_modulation.1"]
    straight = read("flux1", {"norm_out.linear": rows})
    ours = read("flux1", {"final_layer.adaLN_modulation.1": rows})
    assert torch.equal(ours["norm_out.linear.shift"], straight["norm_out.linear.scale"])
    assert not torch.equal(ours["norm_out.linear.shift"], straight["norm_out.linear.shift"])
