"""Tables of names against the model classes of diffusers and transformers, built on no device.

The configurations are those of the published models (``scripts/convert_*_to_diffusers.py`` of
diffusers, ``config.json`` of the text encoders).
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

from lorafind.formats.names import tables
from lorafind.formats.names.table import flatten

Config = dict[str, Any]
Found = dict[str, tuple[int, set[int], bool]]

I2V: Config = {"image_dim": 1280, "in_channels": 36}
SMALL: Config = {"num_layers": 1}


def wan(heads: int, ffn: int, layers: int) -> Config:
    return {"num_attention_heads": heads, "ffn_dim": ffn, "num_layers": layers}


def cosmos(heads: int, layers: int, **more: Any) -> list[tuple[str, Config]]:
    common = {"num_attention_heads": heads, "num_layers": layers, **more}
    video = common | SMALL | {"in_channels": 17}
    return [("CosmosTransformer3DModel", common), ("CosmosTransformer3DModel", video)]


def cosmos2(heads: int, layers: int) -> list[tuple[str, Config]]:
    newer = {"in_channels": 17, "num_layers": 1, "num_attention_heads": heads}
    newer |= {"use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}
    fixed: Config = {"extra_pos_embed_type": None}
    return [
        *cosmos(heads, layers, **fixed),
        ("CosmosTransformer3DModel", newer | fixed),
    ]


GATES: Config = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True}
GATES |= {"audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True}
CONNECTORS: Config = {"video_gated_attn": True, "audio_gated_attn": True, "proj_bias": True}
CONNECTORS |= {"video_connector_num_attention_heads": 32, "video_connector_num_layers": 8}
CONNECTORS |= {"audio_connector_num_attention_heads": 32, "audio_connector_num_layers": 8}
CONNECTORS |= {"audio_connector_attention_head_dim": 64, "per_modality_projections": True}

LUMINA2: Config = {"hidden_size": 2304, "cap_feat_dim": 2304, "num_layers": 26}

#: Architecture → (class, configuration) of each model that shares the table; names begin with what
#: stands before a colon.
MODELS: dict[str, list[tuple[str, Config]]] = {
    "z-image": [
        ("ZImageTransformer2DModel", {}),
        ("ZImageTransformer2DModel", {"siglip_feat_dim": 1152, "n_layers": 1}),
    ],
    "lumina2": [("Lumina2Transformer2DModel", LUMINA2)],
    "qwen-image": [
        ("QwenImageTransformer2DModel", {}),
        ("QwenImageTransformer2DModel", {"use_additional_t_cond": True, **SMALL}),
    ],
    "wan-1.3b": [
        ("WanTransformer3DModel", wan(12, 8960, 30)),
        ("WanTransformer3DModel", wan(12, 8960, 30) | I2V | {"added_kv_proj_dim": 1536}),
        ("WanTransformer3DModel", wan(12, 8960, 1) | {"in_channels": 32}),
        ("WanTransformer3DModel", wan(12, 8960, 1) | {"in_channels": 48}),
        (
            "WanVACETransformer3DModel",
            wan(12, 8960, 30) | {"vace_layers": list(range(0, 30, 2)), "vace_in_channels": 96},
        ),
    ],
    "wan-5b": [
        ("WanTransformer3DModel", wan(24, 14336, 30) | {"in_channels": 48, "out_channels": 48}),
        ("WanTransformer3DModel", wan(24, 14336, 1) | {"in_channels": 100, "out_channels": 48}),
    ],
    "wan-14b": [
        ("WanTransformer3DModel", wan(40, 13824, 40)),
        ("WanTransformer3DModel", wan(40, 13824, 40) | I2V | {"added_kv_proj_dim": 5120}),
        ("WanTransformer3DModel", wan(40, 13824, 1) | {"in_channels": 32}),
        ("WanTransformer3DModel", wan(40, 13824, 1) | {"in_channels": 48}),
        ("WanTransformer3DModel", wan(40, 13824, 1) | {"in_channels": 52}),
        (
            "WanVACETransformer3DModel",
            wan(40, 13824, 40) | {"vace_layers": list(range(0, 40, 5)), "vace_in_channels": 96},
        ),
        ("WanAnimateTransformer3DModel", wan(40, 13824, 40) | I2V | {"added_kv_proj_dim": 5120}),
    ],
    "ltxv-2b": [("LTXVideoTransformer3DModel", {})],
    "ltxv-13b": [
        (
            "LTXVideoTransformer3DModel",
            {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
        )
    ],
    "ltx-2": [
        ("LTX2VideoTransformer3DModel", {}),
        ("connectors:LTX2TextConnectors", {}),
    ],
    "ltx-2.3": [
        ("LTX2VideoTransformer3DModel", GATES),
        (
            "LTX2VideoTransformer3DModel",
            GATES | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True},
        ),
        ("connectors:LTX2TextConnectors", CONNECTORS),
    ],
    "krea2": [("Krea2Transformer2DModel", {})],
    "anima": [
        (
            "CosmosTransformer3DModel",
            {"num_attention_heads": 16, "extra_pos_embed_type": None, "max_size": (1, 8, 8)},
        ),
        ("text_conditioner:AnimaTextConditioner", {}),
    ],
    "cosmos-predict2-2b": cosmos2(16, 28),
    "cosmos-predict2-14b": cosmos2(40, 36),
    "cosmos1-7b": cosmos(32, 28),
    "cosmos1-14b": cosmos(40, 36),
}

QWEN3: Config = {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936}

#: Text encoder → (class, its configuration).
ENCODERS: dict[str, tuple[str, Config]] = {
    "te_t5": (
        "T5EncoderModel",
        {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
        | {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"},
    ),
    "te_llm-qwen3-0.6b": (
        "Qwen3Model",
        QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16},
    ),
    "te_llm-qwen3-4b": (
        "Qwen3Model",
        QWEN3
        | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
        | {"num_attention_heads": 32},
    ),
    "te_llm-qwen3-8b": (
        "Qwen3Model",
        QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32},
    ),
    "te_llm-gemma2-2b": (
        "Gemma2Model",
        {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
        | {"vocab_size": 256000},
    ),
    "te_llm-llama-3.1-8b": (
        "LlamaModel",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "te_llm-qwen2.5-7b": (
        "Qwen2_5_VLModel",
        {
            "text_config": {
                **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
                **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
            },
            "vision_config": {
                **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
                "out_hidden_size": 3584,
            },
        },
    ),
}

#: Parameters of no layer: learned vectors that are added or multiplied as they stand. Adapters do
#: not touch them, but for Wan's modulation, which the table has.
BARE = (
    *("x_pad_token", "cap_pad_token", "siglip_pad_token", "keyframes_abs_pos_embedding"),
    *("padding_tokens", "learnable_registers", "pos_emb_t", "pos_emb_h", "pos_emb_w"),
)
#: The motion encoder of Wan Animate scales its weights as it runs; nothing trains it.
LEFT_OUT = ("motion_encoder.",)


def build(name: str, config: Config) -> tuple[str, nn.Module]:
    """Prefix of the names, model."""
    prefix, _, class_name = name.rpartition(":")
    package = "diffusers"
    if class_name == "LTX2TextConnectors":
        package = "diffusers.pipelines.ltx2.connectors"
    with torch.device("meta"):
        model = getattr(importlib.import_module(package), class_name)(**config)
    return f"{prefix}." if prefix else "", model


def record(found: Found, path: str, weight: torch.Tensor) -> None:
    """Enter the weight of a layer as tables have it."""
    norm = weight.ndim == 1
    rows, width = weight.shape[0], math.prod(weight.shape[1:])
    known = found.setdefault(path, (rows, set(), norm))
    assert known[0] == rows, path
    assert known[2] == norm, path
    known[1].add(width)


def weights(model: nn.Module, prefix: str, bare: tuple[str, ...], found: Found) -> None:
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last == "bias" or name.startswith(LEFT_OUT):
            continue
        if last == "weight":
            record(found, prefix + path, parameter)
        elif not last.endswith(bare):
            record(found, prefix + name, parameter)


def in_table(owner: str) -> Found:
    layers = tables.tables()[owner].layers
    return {p: (x.shape[0], {x.shape[1], *x.widths}, x.norm) for p, x in layers.items()}


@pytest.mark.parametrize("owner", MODELS)
def test_layers_are_those_of_diffusers(owner: str) -> None:
    """Every weight of the models, in its shape, and no other."""
    tables_too = () if owner.startswith("wan") else ("scale_shift_table",)
    found: Found = {}
    for name, config in MODELS[owner]:
        prefix, model = build(name, config)
        weights(model, prefix, (*BARE, *tables_too), found)
    assert in_table(owner) == found


@pytest.mark.parametrize("owner", ENCODERS)
def test_layers_are_those_of_transformers(owner: str) -> None:
    import transformers

    name, config = ENCODERS[owner]
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    found: Found = {}
    weights(model, "", (), found)
    assert in_table(owner) == {p.removeprefix("language_model."): f for p, f in found.items()}


#: Text encoder → class of a whole model that has it inside, the settings beside its own.
WHOLE: list[tuple[str, str, Config]] = [
    ("te_llm-qwen3-0.6b", "Qwen3ForCausalLM", {}),
    ("te_llm-qwen3-4b", "Qwen3ForCausalLM", {}),
    ("te_llm-qwen3-8b", "Qwen3ForCausalLM", {}),
    ("te_llm-gemma2-2b", "Gemma2ForCausalLM", {}),
    ("te_llm-llama-3.1-8b", "LlamaForCausalLM", {}),
    ("te_llm-qwen2.5-7b", "Qwen2_5_VLForConditionalGeneration", {}),
    ("te_llm-qwen3-4b", "Qwen3VLModel", {"vision_config": {"depth": 1}}),
    ("te_llm-qwen3-4b", "Qwen3VLForConditionalGeneration", {"vision_config": {"depth": 1}}),
    ("te_llm-qwen3-8b", "Qwen3VLModel", {"vision_config": {"depth": 1}}),
    ("te_llm-llama-3.1-8b", "LlavaForConditionalGeneration", {}),
]
#: What the whole models have besides: their heads, eyes of other models.
BESIDES = ("lm_head", "visual.", "model.visual.", "model.vision_tower.", "model.multi_modal")


@pytest.mark.parametrize(("owner", "class_name", "more"), WHOLE)
def test_names_inside_a_whole_model(owner: str, class_name: str, more: Config) -> None:
    """Language models and those that see name the same layers with prefixes of their own."""
    import transformers

    config = ENCODERS[owner][1]
    model_class = getattr(transformers, class_name)
    if class_name.startswith("Llava"):
        config = {"text_config": {"model_type": "llama", **config}}
    elif class_name.startswith("Qwen3VL"):
        config = {"text_config": config}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config, **more))
    besides = BESIDES if "VL" not in class_name or more else BESIDES[:1]
    index = tables.index()
    seen = set()
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last != "weight" or path.startswith(besides):
            continue
        entry = index.get(flatten(path)).get(owner)
        assert entry is not None, path
        shape = parameter.shape[0], math.prod(parameter.shape[1:])
        assert entry.fits(shape, "norm" if parameter.ndim == 1 else "weight"), path
        assert path.endswith(entry.path)
        seen.add(entry.path)
    assert seen == set(tables.tables()[owner].layers)


def test_names_of_language_models_inside_older_classes() -> None:
    """transformers before 4.52 called them so; trainers of HunyuanVideo still do."""
    found = tables.index().get("language_model_model_layers_31_mlp_up_proj")
    assert found["te_llm-llama-3.1-8b"].path == "layers.31.mlp.up_proj"


def test_a_text_encoder_of_a_table_is_a_table() -> None:
    known = tables.tables()
    for owner in MODELS:
        for encoder in known[owner].encoders:
            assert known[encoder].component == encoder.partition("-")[0]
