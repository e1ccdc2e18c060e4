"""The stem of a key: prefixes off, the rest the module's name.

Prefixes tell who wrote a file and at best the component, never the spelling of the module: the
body decides that (:mod:`lorafind.formats.detect`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from lorafind.formats.names.table import flatten


class Module(NamedTuple):
    """What a stem says.

    component: ``unet`` (of U-Nets and transformers alike), ``te1``, ``te2`` … as the prefix has it,
    ``te`` where it gives no number because there is one text encoder, ``te_prior`` of Stable
    Cascade, ``te_any`` where a name stands in its place; ``text`` or ``model`` without a prefix;
    flat: the flattened name; writer: who writes such prefixes.
    """

    component: str
    flat: str
    writer: str


#: Prefix → component, writer. Longer ones before their beginnings.
PREFIXES = (
    ("lora_unet_unet_", "unet", "kohya"),
    ("lora_unet_", "unet", "kohya"),
    ("oft_unet_", "unet", "kohya"),
    ("oft_te_", "te", "kohya"),
    ("lora_te1_", "te1", "kohya"),
    ("lora_te2_", "te2", "kohya"),
    ("lora_te3_", "te3", "kohya"),
    ("lora_te4_", "te4", "kohya"),
    ("lora_te_", "te", "kohya"),
    ("lora_transformer_", "unet", "onetrainer"),
    ("lora_prior_unet_", "unet", "kohya"),
    ("lora_prior_te_", "te_prior", "kohya"),
    ("lycoris_", "unet", "kohya"),
    ("base_model.model.", "", "peft"),
    ("text_encoders.clip_l.transformer.", "te1", "onetrainer"),
    ("text_encoders.clip_g.transformer.", "te2", "onetrainer"),
    ("text_encoders.clip_h.transformer.", "te", "onetrainer"),
    ("text_encoder_2.", "te2", "diffusers"),
    ("text_encoder_3.", "te3", "diffusers"),
    ("text_encoder_4.", "te4", "diffusers"),
    ("text_encoder.", "te1", "diffusers"),
    ("model.diffusion_model.", "unet", "comfy"),
    ("diffusion_model.", "unet", "comfy"),
    ("conditional_transformer.", "unet", "diffusers"),
    ("transformer.", "unet", "diffusers"),
    ("unet.", "unet", "diffusers"),
)

#: ComfyUI's name of any other text encoder: t5xxl, llama, qwen25_7b, qwen3_06b, hydit_clip …
_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.(?=.)")

#: The network in the code of Cosmos and of what was made of it.
_NETWORK = re.compile(r"net\.(?=(?:blocks|[xt]_embed\w+|final_layer|llm_adapter)\.)")

#: How names begin that a tool cut by the length of a prefix which they did not have.
CUT = {"sformer_blocks": "transformer_blocks", "le_transformer_blocks": "single_transformer_blocks"}

#: How names begin that tell the component where no prefix does.
UNET_STARTS = (
    *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "time_embed_", "label_emb"),
)
TE_STARTS = ("text_model", "text_projection")


@lru_cache(maxsize=2**14)
def name_of(stem: str) -> Module:
    """The module of a stem: every known prefix taken off, the rest flattened."""
    component, writer = "", ""
    found = True
    while found:
        found = False
        for prefix, part, who in PREFIXES:
            if stem.startswith(prefix) and len(stem) > len(prefix):
                stem = stem[len(prefix) :]
                component, writer = part or component, writer or who
                found = True
                break
    if not component and (other := _ENCODER.match(stem)):
        stem, component, writer = stem[other.end() :], "te_any", writer or "onetrainer"
    if network := _NETWORK.match(stem):
        stem, component = stem[network.end() :], component or "unet"
    flat = flatten(stem).lstrip("_")
    for cut, whole in CUT.items():
        if flat.startswith(f"{cut}_"):
            flat = whole + flat.removeprefix(cut)
    if flat.startswith(TE_STARTS) and not component.startswith("te"):
        component = "text"
    elif not component:
        component = "unet" if flat.startswith(UNET_STARTS) else "model"
    return Module(component, flat, writer)
