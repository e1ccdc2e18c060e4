"""Which transformer an adapter is for: from parts of it, with strangers in it, by its encoders."""

from __future__ import annotations

import re

import pytest

from lorafind.files.safetensors import TensorInfo
from lorafind.formats.adapter import Plan
from lorafind.formats.names.places import place
from lorafind.formats.names.table import flatten
from lorafind.formats.names.tables import tables
from lorafind.formats.plan import understand
from lorafind.formats.prefixes import name_of

Rows = list[tuple[str, int, int]]


def plan(rows: Rows) -> Plan:
    """Of LoRA factors of rank 4 for (stem, o, n)."""
    found = {}
    for stem, o, n in rows:
        found[f"{stem}.lora_A.weight"] = TensorInfo("F16", (4, n), 0, 0)
        found[f"{stem}.lora_B.weight"] = TensorInfo("F16", (o, 4), 0, 0)
    return understand(found, {}, None)


def of(owner: str, pattern: str, prefix: str = "transformer.") -> Rows:
    """The layers of a table whose canonical name has the pattern."""
    return [
        (prefix + path, *layer.shape)
        for path, layer in tables()[owner].layers.items()
        if not layer.norm and re.search(pattern, path)
    ]


def text(owner: str, prefix: str) -> Rows:
    return [
        (prefix + path.replace(".", "_"), *layer.shape)
        for path, layer in tables()[owner].layers.items()
        if not layer.norm and re.search(r"\.\d+\.", path)
    ]


@pytest.mark.parametrize(
    ("owner", "pattern", "found"),
    [
        ("flux1", r"attn\.", "flux1-or-chroma"),
        ("chroma", "block", "flux1-or-chroma"),
        ("chroma", "attn|guidance", "chroma"),
        ("flux1", r"norm1\.linear", "flux1"),
        (
            "flux1",
            r"blocks\.[1-4]\.attn\.to_out",
            "flux1-or-chroma-or-flux2-klein-4b-or-hunyuanvideo-or-qwen-image",
        ),
        ("flux2-klein-4b", r"^transformer_blocks.*attn", "flux2-klein-4b"),
        ("hunyuanvideo", r"transformer_blocks.*attn", "hunyuanvideo"),
        ("qwen-image", "attn", "qwen-image"),
        ("pixart", "attn", "pixart-or-sana-0.6b"),
        ("pixart", r"attn|\.ff\.", "pixart"),
        ("sana-0.6b", r"attn|\.ff\.", "sana-0.6b"),
        ("sd3", r"attn\.", "sd3-or-sd3.5-medium"),
        ("sd3.5-medium", "attn", "sd3.5-medium"),
        ("wan-14b", r"blocks\.\d+\.attn", "wan-14b"),
        ("wan-14b", r"^blocks\.7\.ffn", "wan-14b"),
        ("ltxv-2b", "attn", "ltxv-2b"),
        ("lumina2", r"attn\.to_k", "lumina2"),
        ("z-image", "attention", "z-image"),
        ("krea2", "attn", "krea2"),
        ("hidream", "ff_i", "hidream"),
    ],
)
def test_parts(owner: str, pattern: str, found: str) -> None:
    assert plan(of(owner, pattern)).architecture == found


def test_blocks_of_one_model_alone_are_all_there() -> None:
    """The attention is the same string in three models; only one has so many blocks."""
    whole = of("flux1", r"attn\.to_q")
    assert plan(whole).architecture == "flux1-or-chroma"
    some = [row for row in whole if ".3." not in row[0]]
    assert plan(some).architecture == "flux1-or-chroma-or-hunyuanvideo"


@pytest.mark.parametrize(
    "extra",
    [
        "vace_extra_blocks.{}.self_attn.q",
        "pose_blocks.{}.linear1_kv",
        "audio_proj.proj{}.layer",
        "blocks.{}.audio_cross_attn_wrapper.audio_cross_attn.k",
    ],
)
def test_what_was_added_to_a_model_does_not_make_it_another(extra: str) -> None:
    rows = of("wan-14b", r"^blocks\.\d+\.(attn|ffn)")
    strangers = [(f"diffusion_model.{extra.format(n)}", 512, 512) for n in range(40)]
    found = plan(rows + strangers)
    assert found.architecture == "wan-14b"
    kept = {m.name for m in found.modules if m.place.component == "model"}
    assert len(kept) == 40 and not found.unknown_keys
    assert "40 modules are not part of wan-14b" in found.notes


def test_more_blocks_than_a_model_has_are_another_model() -> None:
    rows = of("wan-14b", r"^blocks\.\d+\.attn")
    more = [(stem.replace(".39.", ".40."), o, n) for stem, o, n in rows if ".39." in stem]
    assert plan(rows + more).architecture.startswith("other:")


def test_next_months_model_is_an_unknown_one() -> None:
    rows = [(f"transformer.blocks.{n}.attn.to_q", 3584, 3584) for n in range(40)]
    rows += [(f"transformer.blocks.{n}.mlp.up", 14336, 3584) for n in range(40)]
    found = plan(rows)
    assert found.architecture.startswith("other:")
    assert found.modules[0].name == "model/blocks_0_attn_to_q"
    assert found.notes == ()


def test_a_wider_input_has_a_name_of_its_own() -> None:
    """Flux.1 Fill reads 384 channels: not the layer of the plain model."""
    rows = [(s, o, 384 if "x_embedder" in s else n) for s, o, n in of("flux1", "x_embedder|norm")]
    found = plan(rows)
    assert found.architecture == "flux1"
    assert "transformer/x_embedder[3072×384]" in {m.name for m in found.modules}


ATTENTION = of("flux1", r"attn\.")


@pytest.mark.parametrize(
    ("main", "encoder", "architecture"),
    [
        (ATTENTION, text("te_t5", "lora_te3_"), "flux1"),
        (ATTENTION, text("te_t5", "lora_te2_"), "flux1"),
        (ATTENTION, text("te_t5", "lora_te_"), "chroma"),
        (of("pixart", "attn"), text("te_llm-gemma2-2b", "lora_te_"), "sana-0.6b"),
        (of("pixart", "attn"), text("te_t5", "text_encoder."), "pixart"),
        (of("sd3", r"attn\."), text("te_t5", "text_encoders.t5xxl.transformer."), None),
    ],
)
def test_text_encoders_narrow(main: Rows, encoder: Rows, architecture: str | None) -> None:
    found = plan(main + encoder)
    assert found.architecture == (architecture or "sd3-or-sd3.5-medium")
    assert not any(m.name.startswith("model/") for m in found.modules)
    texts = {m.place.component for m in found.modules if m.place.group == "text"}
    assert texts == {
        "te_llm" if "gemma" in str(architecture) or architecture == "sana-0.6b" else "te_t5"
    }


def test_a_foreign_text_encoder_is_said() -> None:
    found = plan(of("wan-14b", "attn1") + text("te_llm-qwen3-0.6b", "lora_te_"))
    assert found.architecture == "wan-14b"
    assert any("te_llm-qwen3-0.6b is not that of wan-14b" in note for note in found.notes)


@pytest.mark.parametrize(
    ("owner", "prefix", "found"),
    [
        ("te_llm-qwen3-0.6b", "lora_te_", "anima"),
        ("te_llm-qwen2.5-7b", "lora_te_", "qwen-image"),
        ("te_llm-qwen3-0.6b", "text_encoders.qwen3_06b.transformer.model.", "anima"),
    ],
)
def test_text_encoders_alone(owner: str, prefix: str, found: str) -> None:
    rows = text(owner, prefix)
    assert found in plan(rows).architecture.split("-or-")
    assert {m.place.component for m in plan(rows).modules} == {"te_llm"}


def test_a_language_models_adapter_is_not_for_pictures() -> None:
    """The same layers without a text encoder's prefix: a model for texts."""
    layers = tables()["te_llm-llama-3.1-8b"].layers
    rows = [
        (f"base_model.model.model.{path}", *layer.shape)
        for path, layer in layers.items()
        if path.endswith(("q_proj", "v_proj"))
    ]
    assert plan(rows).architecture.startswith("other:")


@pytest.mark.parametrize(
    ("stem", "component", "flat"),
    [
        ("lora_unet__blocks_0_self_attn_q", "unet", "blocks_0_self_attn_q"),
        (
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "unet",
            "transformer_blocks_0_attn_to_q",
        ),
        ("transformer.base_model.model.proj_out", "unet", "proj_out"),
        (
            "unet.base_model.model.transformer_blocks.0.ff.net.2",
            "unet",
            "transformer_blocks_0_ff_net_2",
        ),
        ("model.diffusion_model.double_blocks.0.img_mlp.0", "unet", "double_blocks_0_img_mlp_0"),
        ("conditional_transformer.layers.0.attention.o", "unet", "layers_0_attention_o"),
        ("sformer_blocks.3.attn.to_q", "model", "transformer_blocks_3_attn_to_q"),
        ("le_transformer_blocks.3.attn.to_out", "model", "single_transformer_blocks_3_attn_to_out"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.x", "te_any", "encoder_block_0_x"),
        ("text_encoders.clip_g.transformer.text_model.x", "te2", "text_model_x"),
        ("lora_prior_te_text_model_x", "te_prior", "text_model_x"),
        ("net.blocks.0.mlp.layer1", "unet", "blocks_0_mlp_layer1"),
        ("lora_te4_model_layers_0_x", "te4", "model_layers_0_x"),
        ("text_encoder_3.encoder.block.0.x", "te3", "encoder_block_0_x"),
        ("oft_unet_transformer_blocks_0_x", "unet", "transformer_blocks_0_x"),
    ],
)
def test_prefixes(stem: str, component: str, flat: str) -> None:
    assert name_of(stem)[:2] == (component, flat)


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("transformer_blocks.0.attn.to_q", "self_attn"),
        ("transformer_blocks.0.attn.add_k_proj", "self_attn"),
        ("transformer_blocks.0.attn.to_add_out", "self_attn"),
        ("blocks.3.attn1.to_out.0", "self_attn"),
        ("layers.7.attention.to_v", "self_attn"),
        ("blocks.3.attn2.add_k_proj", "cross_attn"),
        ("transformer_blocks.1.audio_to_video_attn.to_q", "cross_attn"),
        ("transformer_blocks.0.ff_context.net.0.proj", "ff"),
        ("transformer_blocks.0.img_mlp.net.2", "ff"),
        ("transformer_blocks.0.ff.conv_depth", "ff"),
        ("single_transformer_blocks.9.proj_mlp", "ff"),
        ("single_transformer_blocks.9.proj_out", "ff"),
        ("double_stream_blocks.0.block.ff_i.experts.2.w1", "ff"),
        ("layers.0.feed_forward.w2", "ff"),
        ("context_embedder.token_refiner.refiner_blocks.1.attn.to_q", "self_attn"),
        ("transformer_blocks.0.norm1.linear", "other"),
        ("transformer_blocks.0.img_mod.1", "other"),
        ("proj_out", "other"),
        ("vace_blocks.0.proj_out", "other"),
        ("time_text_embed.text_embedder.linear_1", "other"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "other"),
        ("t_embedder.mlp.0", "other"),
        ("norm_out.linear.shift", "other"),
    ],
)
def test_groups(path: str, group: str) -> None:
    assert place(f"transformer/{path}").group == group
    assert place(f"transformer/{path}.bias", vector=True).group == "other"


@pytest.mark.parametrize("component", ["te1", "te_t5", "te_llm"])
def test_text_encoders_are_one_group(component: str) -> None:
    assert place(f"{component}/encoder.block.0.layer.1.DenseReluDense.wo").group == "text"


def test_numbers_without_end_are_no_blocks() -> None:
    long = "9" * 5000
    rows = [(f"lora_unet_blocks_{long}_self_attn_q", 64, 64), (f"lora_te_layers_{long}_q", 64, 64)]
    assert plan(rows).architecture.startswith("other:")


def test_what_cannot_be_told_apart_has_one_name() -> None:
    """A name and shape that several networks have means layers of the same name in all of them:
    else a file would meet those of one candidate only. Embedders outside of the blocks, which few
    files hold, are called after what they embed.
    """
    means: dict[tuple[str, tuple[int, int]], set[tuple[str, ...]]] = {}
    for table in tables().values():
        for name, entry in table.entries():
            paths = tuple(layer.path for layer in entry.parts)
            means.setdefault((flatten(name), entry.shape), set()).add(paths)
    apart = {name for (name, _), paths in means.items() if len(paths) > 1}
    assert not any(re.search(r"(blocks|layers|refiner)_\d", name) for name in apart)
    embedders = r"norm_out_linear|(img|time|t)_(in|embedder|block).*"
    assert all(re.fullmatch(embedders, name) for name in apart), apart
