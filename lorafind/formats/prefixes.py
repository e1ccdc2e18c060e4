"""The stem of a key: prefixes off, the rest the module's name.

Prefixes tell who wrote a file and at best the component, never the spelling of the module: the
body decides that (:mod:`lorafind.formats.detect`).
"""

from __future__ import annotations

from typing import NamedTuple

from lorafind.formats.names.table import flatten


class Module(NamedTuple):
    """What a stem says.

    component: ``unet``, ``te``, ``te1`` … as the prefix has it; ``text`` or ``model`` without one;
    flat: the flattened name; writer: who writes such prefixes.
    """

    component: str
    flat: str
    writer: str


#: Prefix → component, writer. Longer ones before their beginnings.
PREFIXES = (
    ("lora_unet_unet_", "unet", "kohya"),
    ("lora_unet_", "unet", "kohya"),
    ("lora_te1_", "te1", "kohya"),
    ("lora_te2_", "te2", "kohya"),
    ("lora_te3_", "te3", "kohya"),
    ("lora_te4_", "te4", "kohya"),
    ("lora_te_", "te", "kohya"),
    ("lora_transformer_", "unet", "kohya"),
    ("lora_prior_unet_", "unet", "kohya"),
    ("lora_prior_te_", "te", "kohya"),
    ("lycoris_", "unet", "kohya"),
    ("base_model.model.", "", "peft"),
    ("text_encoders.clip_l.transformer.", "te1", "onetrainer"),
    ("text_encoders.clip_g.transformer.", "te2", "onetrainer"),
    ("text_encoders.clip_h.transformer.", "te", "onetrainer"),
    ("text_encoder_2.", "te2", "diffusers"),
    ("text_encoder_3.", "te3", "diffusers"),
    ("text_encoder.", "te1", "diffusers"),
    ("model.diffusion_model.", "unet", "comfy"),
    ("diffusion_model.", "unet", "comfy"),
    ("transformer.", "unet", "diffusers"),
    ("unet.", "unet", "diffusers"),
)

#: How names begin that tell the component where no prefix does.
UNET_STARTS = (
    *("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks"),
    *("conv_in", "conv_out", "time_embedding", "add_embedding", "time_embed_", "label_emb"),
)
TE_STARTS = ("text_model", "text_projection")


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
    flat = flatten(stem).lstrip("_")
    if flat.startswith(TE_STARTS) and not component.startswith("te"):
        component = "text"
    elif not component:
        component = "unet" if flat.startswith(UNET_STARTS) else "model"
    return Module(component, flat, writer)
