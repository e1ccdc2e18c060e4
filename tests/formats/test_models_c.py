"""Tables of names against the classes of diffusers, built without weights.

The configurations are those of the published models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lorafind.formats.names import tables

diffusers = pytest.importorskip("diffusers")


@dataclass(frozen=True)
class Published:
    """Models of one table.

    configs: of each, on top of ``common``; parameters: what is no weight of a layer and has no
    name in the table; shapes: what a model has in another shape than the table, where rows differ.
    """

    model: str
    common: dict[str, Any]
    configs: tuple[dict[str, Any], ...] = ({},)
    parameters: frozenset[str] = frozenset()
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)


TABLES = {"scale_shift_table"}
SANA: dict[str, Any] = {"in_channels": 32, "out_channels": 32, "caption_channels": 2304}
NORMS = "rms_norm_across_heads"


def cascade(width: int, few: int, many: int) -> dict[str, Any]:
    return {
        "in_channels": 16,
        "out_channels": 16,
        "timestep_ratio_embedding_dim": 64,
        "patch_size": 1,
        "conditioning_dim": width,
        "block_out_channels": (width, width),
        "num_attention_heads": (width // 64, width // 64),
        "down_num_layers_per_block": (few, many),
        "up_num_layers_per_block": (many, few),
        "down_blocks_repeat_mappers": (1, 1),
        "up_blocks_repeat_mappers": (1, 1),
        "block_types_per_layer": (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        "clip_text_in_channels": 1280,
        "clip_text_pooled_in_channels": 1280,
        "clip_image_in_channels": 768,
        "clip_seq": 4,
        "switch_level": (False,),
    }


#: The factors of the global response norm between the two channelwise layers.
RESPONSE = frozenset({"channelwise.2.gamma", "channelwise.2.beta"})

MODELS = {
    "pixart": Published(
        "PixArtTransformer2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8}
        | {"num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096},
        ({"use_additional_conditions": True}, {"use_additional_conditions": False}),
        frozenset(TABLES),
    ),
    "sana-0.6b": Published(
        "SanaTransformer2DModel",
        SANA
        | {"num_attention_heads": 36, "attention_head_dim": 32, "num_layers": 28}
        | {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
        | {"cross_attention_dim": 1152},
        ({}, {"guidance_embeds": True, "qk_norm": NORMS}),
        frozenset(TABLES),
    ),
    "sana-1.6b": Published(
        "SanaTransformer2DModel",
        SANA
        | {"num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20}
        | {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
        | {"cross_attention_dim": 2240},
        ({}, {"qk_norm": NORMS}, {"guidance_embeds": True, "qk_norm": NORMS}),
        frozenset(TABLES),
    ),
    "sana-4.8b": Published(
        "SanaTransformer2DModel",
        SANA
        | {"num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 60}
        | {"num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
        | {"cross_attention_dim": 2240},
        ({"qk_norm": NORMS},),
        frozenset(TABLES),
    ),
    "hidream": Published(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 16}
        | {"num_single_layers": 32, "attention_head_dim": 128, "num_attention_heads": 20}
        | {"caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4}
        | {"num_activated_experts": 2, "llama_layers": [*range(32), *[31] * 16]},
    ),
    "hunyuan-dit": Published(
        "HunyuanDiT2DModel",
        {"num_attention_heads": 16, "attention_head_dim": 88, "in_channels": 4, "patch_size": 2}
        | {"activation_fn": "gelu-approximate", "sample_size": 128, "hidden_size": 1408}
        | {"num_layers": 40, "mlp_ratio": 4.3637, "learn_sigma": True}
        | {"cross_attention_dim": 1024, "cross_attention_dim_t5": 2048}
        | {"pooled_projection_dim": 1024, "text_len": 77, "text_len_t5": 256},
        (
            {"use_style_cond_and_image_meta_size": True},
            {"use_style_cond_and_image_meta_size": False},
        ),
        frozenset({"text_embedding_padding", "positional_embedding"}),
    ),
    "cascade": Published("StableCascadeUNet", cascade(2048, 8, 24), parameters=RESPONSE),
    "cascade-lite": Published("StableCascadeUNet", cascade(1536, 4, 12), parameters=RESPONSE),
    "ideogram4": Published(
        "Ideogram4Transformer2DModel",
        {"in_channels": 128, "num_layers": 34, "attention_head_dim": 256}
        | {"num_attention_heads": 18, "intermediate_size": 12288, "adaln_dim": 512}
        | {"llm_features_dim": 53248},
    ),
    "cogvideox-2b": Published(
        "CogVideoXTransformer3DModel", {"num_attention_heads": 30, "num_layers": 30}
    ),
    "cogvideox-5b": Published(
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        (
            {},
            {"in_channels": 32, "use_learned_positional_embeddings": True},
            {"patch_size_t": 2, "patch_bias": False},
            {"in_channels": 32, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 512},
        ),
        shapes={"proj_out": (128, 3072)},
    ),
}


def build(published: Published, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter → shape of a model that takes no memory."""
    with torch.device("meta"):
        model = getattr(diffusers.models, published.model)(**published.common | config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def true_layers(
    published: Published, config: dict[str, Any], left: set[str]
) -> dict[str, tuple[int, ...]]:
    """Layer → shape, (o, n) of a weight and (o,) of a norm's; ``left`` gets what is none."""
    found: dict[str, tuple[int, ...]] = {}
    parameters = build(published, config)
    for name, shape in parameters.items():
        path, _, last = name.rpartition(".")
        endings = {ending for ending in published.parameters if name.endswith(ending)}
        if endings:
            left |= endings
            continue
        assert last in ("weight", "bias"), name
        if last == "bias":
            assert f"{path}.weight" in parameters, name
            continue
        found[path] = shape if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    return found


def own_layers(table: tables.Table) -> dict[str, list[tuple[int, ...]]]:
    """Every diffusers name → the shapes that the table allows."""
    found: dict[str, list[tuple[int, ...]]] = {}
    runs = set()
    for name, entry in table.entries():
        if entry.spelling:
            continue
        if len(entry.parts) > 1:
            runs |= {part.path for part in entry.parts}
        (rows, columns), first = entry.shape, entry.parts[0]
        found[name] = [(rows,)] if first.norm else [(rows, n) for n in (columns, *first.widths)]
    return {name: shapes for name, shapes in found.items() if name not in runs}


@pytest.mark.parametrize("owner", list(MODELS))
def test_names_and_shapes_are_those_of_diffusers(owner: str) -> None:
    published = MODELS[owner]
    own = own_layers(tables.tables()[owner])
    seen: dict[str, set[tuple[int, ...]]] = {}
    left: set[str] = set()
    for config in published.configs:
        for path, shape in true_layers(published, config, left).items():
            seen.setdefault(path, set()).add(shape)
    for path, other in published.shapes.items():
        seen[path].remove(other)
    assert {path: set(shapes) for path, shapes in own.items()} == seen
    assert left == published.parameters
