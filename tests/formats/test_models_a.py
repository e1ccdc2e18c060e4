"""Tables of the Flux, HunyuanVideo, SD3 and AuraFlow families against the models of diffusers."""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import pytest

from lorafind.formats.names import tables
from lorafind.formats.names.table import flatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

#: Name → (rows, columns, one-dimensional).
Shapes = dict[str, tuple[int, int, bool]]

SD3: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
FLUX2: dict[str, Any] = {"guidance_embeds": False}

#: Table → class of diffusers and how the published model differs from the class's defaults;
#: options that only some published models have are all switched on.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "chroma": ("ChromaTransformer2DModel", {}),
    "flux2-dev": ("Flux2Transformer2DModel", {}),
    "flux2-klein-9b": (
        "Flux2Transformer2DModel",
        FLUX2 | {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    ),
    "flux2-klein-4b": (
        "Flux2Transformer2DModel",
        FLUX2
        | {"num_layers": 5, "num_single_layers": 20}
        | {"num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "hunyuanvideo": (
        "HunyuanVideoFramepackTransformer3DModel",
        {"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    "hunyuanvideo-1.5": ("HunyuanVideo15Transformer3DModel", {"use_meanflow": True}),
    "hunyuanimage": (
        "HunyuanImageTransformer2DModel",
        {"text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
    ),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    "sd3.5-large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
        | {"qk_norm": "rms_norm"},
    ),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
}

#: Parameters that are no layer's weight or bias: nothing trains them and no spelling renames them.
BARE = {"register_tokens", "pos_embed.pos_embed"}


def built(name: str, options: dict[str, Any]) -> Shapes:
    """Every layer with a weight of a model of diffusers."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    found: Shapes = {}
    for key, tensor in model.named_parameters():
        path, _, last = key.rpartition(".")
        if last == "weight":
            found[path] = (tensor.shape[0], prod(tensor.shape[1:]), tensor.dim() == 1)
        else:
            assert last == "bias" or key in BARE, key
    return found


def told(owner: str) -> Shapes:
    """Every layer of a table, those put together that the table has in pieces."""
    table = tables.tables()[owner]
    found = {p: (*layer.shape, layer.norm) for p, layer in table.layers.items()}
    for name, spelling, paths in table.names:
        if spelling == "diffusers" and all(path.startswith(f"{name}.") for path in paths):
            pieces = [found.pop(path) for path in paths]
            found[name] = (sum(rows for rows, _, _ in pieces), *pieces[0][1:])
    return found


@pytest.mark.parametrize("owner", list(MODELS))
def test_layers_are_those_of_diffusers(owner: str) -> None:
    assert told(owner) == built(*MODELS[owner])


def test_hunyuanvideo_lacks_what_framepack_adds() -> None:
    framepack = {p for p in told("hunyuanvideo") if p.startswith(("image_proj", "clean_x_"))}
    plain = built("HunyuanVideoTransformer3DModel", {})
    assert set(told("hunyuanvideo")) - framepack == set(plain)
    assert len(framepack) == 5


@pytest.mark.parametrize(
    ("owner", "model", "path", "channels"),
    [
        ("flux1", "FluxTransformer2DModel", "x_embedder", (64, 128, 384)),
        ("hunyuanvideo", "HunyuanVideoTransformer3DModel", "x_embedder.proj", (16, 32, 33)),
    ],
)
def test_widths_of_the_input(owner: str, model: str, path: str, channels: tuple[int, ...]) -> None:
    """Fill, Canny and Depth; SkyReels I2V and HunyuanVideo I2V: diffusers' ``in_channels``."""
    layer = tables.tables()[owner].layers[path]
    entry = tables.index().get(flatten(path))[owner]
    for count in channels:
        options = {"in_channels": count, "num_layers": 1, "num_single_layers": 1}
        rows, columns, _ = built(model, options)[path]
        assert rows == layer.shape[0]
        assert entry.fits((rows, columns), "weight")
    assert not entry.fits((layer.shape[0], 4096), "weight")


@pytest.mark.parametrize("owner", list(MODELS))
def test_every_name_is_found_and_means_one_thing(owner: str) -> None:
    """Read as a file writes it, flattened; no name has a layer twice."""
    for name, entry in tables.tables()[owner].entries():
        paths = [layer.path for layer in entry.parts]
        assert list(parts(owner, name)) == paths, name
        assert len(set(paths)) == len(paths), name
        assert not entry.parts[0].norm or len(paths) == 1, name


@pytest.mark.parametrize("owner", list(MODELS))
def test_native_names_reach_every_layer(owner: str) -> None:
    """Apart from layers that the original code calls as diffusers does, or that it lacks."""
    table = tables.tables()[owner]
    reached = {p for _, spelling, paths in table.names if spelling == "native" for p in paths}
    alike = {
        "chroma": {"distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"},
        "hunyuanvideo": {
            *("image_projection.up", "image_projection.down"),
            *(f"clean_x_embedder.proj{zoom}" for zoom in ("", "_2x", "_4x")),
        },
    } | {sd3: {"context_embedder"} for sd3 in ("sd3", "sd3.5-medium", "sd3.5-large")}
    assert set(table.layers) - reached == alike.get(owner, set())


def parts(owner: str, name: str) -> tuple[str, ...]:
    """Canonical names of what a name means."""
    return tuple(layer.path for layer in tables.index().get(flatten(name))[owner].parts)


@pytest.mark.parametrize(
    "owner", [o for o in MODELS if o.startswith(("flux1", "chroma", "sd3"))] + ["hunyuanvideo"]
)
def test_a_number_behind_a_fused_layer_is_that_of_its_part(owner: str) -> None:
    numbered = [
        name
        for name, spelling, _ in tables.tables()[owner].names
        if spelling == "onetrainer" and name[-2:] in (".0", ".1", ".2", ".3")
    ]
    for name in numbered:
        whole, _, number = name.rpartition(".")
        assert parts(owner, name) == parts(owner, whole)[int(number) :][:1], name
    wholes = {name.rpartition(".")[0] for name in numbered}
    assert sum(len(parts(owner, whole)) for whole in wholes) == len(numbered)


@pytest.mark.parametrize("owner", ["flux1", "chroma"])
def test_linear1_qkv_is_the_beginning_of_linear1(owner: str) -> None:
    for n in (0, 37):
        whole, beginning = f"single_blocks.{n}.linear1", f"single_blocks.{n}.linear1_qkv"
        assert parts(owner, beginning) == parts(owner, whole)[:3]
        if owner == "flux1":
            assert parts(owner, f"single_blocks.{n}.processor.qkv_lora") == parts(owner, beginning)


#: How ComfyUI calls the layers of HunyuanVideo, from how the original code does: endings.
COMFY = {
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "img_attn_q_norm": "img_attn.norm.query_norm.scale",
    "img_attn_k_norm": "img_attn.norm.key_norm.scale",
    "txt_attn_q_norm": "txt_attn.norm.query_norm.scale",
    "txt_attn_k_norm": "txt_attn.norm.key_norm.scale",
    ".q_norm": ".norm.query_norm.scale",
    ".k_norm": ".norm.key_norm.scale",
    ".mlp.fc1": ".mlp.0",
    ".mlp.fc2": ".mlp.2",
    "_mlp.fc1": "_mlp.0",
    "_mlp.fc2": "_mlp.2",
    "t_embedder.mlp.0": "t_embedder.in_layer",
    "t_embedder.mlp.2": "t_embedder.out_layer",
    "c_embedder.linear_1": "c_embedder.in_layer",
    "c_embedder.linear_2": "c_embedder.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
}


@pytest.mark.parametrize("owner", ["hunyuanvideo", "hunyuanvideo-1.5", "hunyuanimage"])
def test_comfyui_names_of_hunyuan_models(owner: str) -> None:
    used = set()
    for name, spelling, paths in tables.tables()[owner].names:
        ending = next((e for e in COMFY if name.endswith(e)), "")
        if spelling == "native" and ending:
            assert parts(owner, name.removesuffix(ending) + COMFY[ending]) == paths
            used.add(ending)
    single = {"modulation.linear", ".q_norm", ".k_norm"}
    assert used == set(COMFY) - (single if owner == "hunyuanvideo-1.5" else set())


def test_hunyuan_models_mean_the_same_by_the_same_names() -> None:
    """No converter of 1.5 and Image is installed: what they share is held against HunyuanVideo."""
    whole = {name: paths for name, _, paths in tables.tables()["hunyuanvideo"].names}
    for owner, time in (
        ("hunyuanvideo-1.5", "time_embed."),
        ("hunyuanimage", "time_guidance_embed."),
    ):
        names = {name: paths for name, _, paths in tables.tables()[owner].names}
        shared = names.keys() & whole.keys()
        assert len(shared) > 300
        for name in shared:
            like = tuple(
                time + path.removeprefix("time_text_embed.")
                if path.startswith("time_text_embed.")
                else path
                for path in whole[name]
            )
            assert names[name] == like, name


@pytest.mark.parametrize("stream", ["img", "txt"])
def test_split_attention_of_hunyuanvideo_15_makes_up_the_fused_one(stream: str) -> None:
    for n in (0, 53):
        split = [parts("hunyuanvideo-1.5", f"double_blocks.{n}.{stream}_attn_{x}") for x in "qkv"]
        fused = parts("hunyuanvideo-1.5", f"double_blocks.{n}.{stream}_attn.qkv")
        assert tuple(path for one in split for path in one) == fused


#: DiffSynth-Studio's names of the layers of Flux.1 and the original ones.
DIFFSYNTH = {
    "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    "final_proj_out": "final_layer.linear",
    "time_embedder.timestep_embedder.0": "time_in.in_layer",
    "time_embedder.timestep_embedder.2": "time_in.out_layer",
    "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
    "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
    "pooled_text_embedder.0": "vector_in.in_layer",
    "pooled_text_embedder.2": "vector_in.out_layer",
    "blocks.3.attn.norm_q_a": "double_blocks_3_img_attn_norm_query_norm",
    "blocks.3.attn.norm_k_b": "double_blocks_3_txt_attn_norm_key_norm",
    "single_blocks.3.norm_q_a": "single_blocks_3_norm_query_norm",
    "blocks.3.norm1_a.linear": "double_blocks_3_img_mod_lin",
    "blocks.3.norm1_b.linear": "double_blocks_3_txt_mod_lin",
    "blocks.3.attn.a_to_qkv": "double_blocks_3_img_attn_qkv",
    "blocks.3.attn.b_to_qkv": "double_blocks_3_txt_attn_qkv",
    "blocks.3.attn.a_to_out": "double_blocks_3_img_attn_proj",
    "blocks.3.attn.b_to_out": "double_blocks_3_txt_attn_proj",
    "blocks.3.ff_a.0": "double_blocks_3_img_mlp_0",
    "blocks.3.ff_a.2": "double_blocks_3_img_mlp_2",
    "blocks.3.ff_b.0": "double_blocks_3_txt_mlp_0",
    "blocks.3.ff_b.2": "double_blocks_3_txt_mlp_2",
    "single_blocks.3.norm.linear": "single_blocks_3_modulation_lin",
    "single_blocks.3.to_qkv_mlp": "single_blocks_3_linear1",
    "single_blocks.3.proj_out": "single_blocks_3_linear2",
}


def test_names_of_diffsynth() -> None:
    for name, like in DIFFSYNTH.items():
        assert parts("flux1", name) == parts("flux1", like)
    count = sum(s == "diffsynth" for _, s, _ in tables.tables()["flux1"].names)
    assert count == 8 + 14 * 19 + 5 * 38


def test_hunyuanimage_spread_over_several_gpus() -> None:
    """Its converter in diffusers cuts the original layers so before it renames them."""
    for n in (0, 39):
        split = [f"single_blocks.{n}.linear1_{x}" for x in ("q", "k", "v", "mlp")]
        fused = parts("hunyuanimage", f"single_blocks.{n}.linear1")
        assert tuple(path for name in split for path in parts("hunyuanimage", name)) == fused
        whole = parts("hunyuanimage", f"single_blocks.{n}.linear2")
        assert parts("hunyuanimage", f"single_blocks.{n}.linear2.fc") == whole


#: Options that make a model small, where its class has them.
SMALL = {
    **{"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_mmdit_layers": 1},
    **{"num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2},
    **{"joint_attention_dim": 8, "caption_projection_dim": 16, "text_embed_dim": 8},
    **{"text_embed_2_dim": 8, "image_embed_dim": 8, "approximator_hidden_dim": 8},
}


@pytest.mark.parametrize("owner", [o for o in MODELS if o != "sd3"])
def test_layers_that_diffusers_fuses(owner: str) -> None:
    """``to_qkv`` and ``to_added_qkv`` stack the layers in the order of the table."""
    name, options = MODELS[owner]
    model = getattr(diffusers, name)
    known = set(inspect.signature(model.__init__).parameters)
    small: dict[str, Any] = {option: value for option, value in SMALL.items() if option in known}
    if "dual_attention_layers" in options:
        small |= {"dual_attention_layers": (0,)}
    fused = set()
    for path, attention in model(**small).named_modules():
        if getattr(attention, "to_q", None) is None:
            continue
        for n, layer in enumerate(attention.children()):
            if isinstance(layer, torch.nn.Linear):
                torch.nn.init.constant_(layer.weight, n)
        whole = {n: child for n, (child, _) in enumerate(attention.named_children())}
        attention.fuse_projections()
        for child in ("to_qkv", "to_added_qkv"):
            if hasattr(attention, child):
                numbers = getattr(attention, child).weight[:, 0].int().unique_consecutive()
                expected = [f"{path}.{whole[int(number)]}" for number in numbers]
                assert list(parts(owner, f"{path}.{child}")) == expected
                fused.add(f"{path}.{child}")
    fusing = {n for n, s, _ in tables.tables()[owner].names if s == "diffusers" and "qkv" in n}
    assert fused == {name for name in fusing if ".0." in name}
