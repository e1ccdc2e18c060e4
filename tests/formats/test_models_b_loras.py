"""Reading of names against diffusers' conversion of adapters.

An adapter of random factors is written in a spelling and converted by diffusers; every module that
comes out must hold the same ΔW as the rows that our table cuts for that name. It is compared
through its product with three random vectors, in float64: linear maps that agree there are equal,
and a layer of 5120 × 13824 need not be built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as conversion

from lorafind.formats.names import tables
from lorafind.formats.names.table import Entry, flatten

Weights = dict[str, torch.Tensor]
Convert = Callable[[Weights], Weights]

RANK = 3
ALPHA = 6.0
DOWN_UP = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")


class Factors(NamedTuple):
    """ΔW = scale · up · down."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def entry(owner: str, name: str) -> Entry:
    """What our tables say of a name without its prefix."""
    return tables.index().get(flatten(name))[owner]


def draw(owner: str, names: Iterable[str], alpha: float | None) -> dict[str, Factors]:
    """Random factors of the true shapes, by name."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for name in names:
        rows, columns = entry(owner, name).shape
        down = torch.randn(RANK, columns, generator=generator, dtype=torch.float64)
        up = torch.randn(rows, RANK, generator=generator, dtype=torch.float64)
        found[name] = Factors(down, up, 1.0 if alpha is None else alpha / RANK)
    return found


def write(
    factors: dict[str, Factors],
    prefix: str,
    suffixes: tuple[str, str] = A_B,
    alpha: float | None = None,
    flat: bool = False,
) -> Weights:
    """The keys of a file."""
    found: Weights = {}
    for name, f in factors.items():
        stem = prefix + (flatten(name) if flat else name)
        found[f"{stem}.{suffixes[0]}"] = f.down
        found[f"{stem}.{suffixes[1]}"] = f.up
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    return found


def probe(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """ΔW times three vectors that depend on its width alone."""
    generator = torch.Generator().manual_seed(down.shape[1])
    vectors = torch.randn(down.shape[1], 3, generator=generator, dtype=torch.float64)
    return up @ (down @ vectors)


def ours(owner: str, factors: dict[str, Factors]) -> Weights:
    """Canonical name → ΔW times the vectors, as our tables cut it."""
    found: Weights = {}
    for name, f in factors.items():
        for layer, start, stop in entry(owner, name).cuts():
            assert layer.path not in found
            found[layer.path] = f.scale * probe(f.down, f.up[start:stop])
    return found


def theirs(converted: Weights) -> Weights:
    """The same from what diffusers made."""
    found = {}
    for key, down in converted.items():
        name, ending, _ = key.rpartition(".lora_A.weight")
        if ending:
            up = converted[f"{name}.lora_B.weight"]
            found[name.removeprefix("transformer.")] = probe(down, up)
    assert len(converted) == 2 * len(found)
    return found


def assert_same(expected: Weights, found: Weights) -> None:
    assert set(found) == set(expected)
    for name, product in expected.items():
        torch.testing.assert_close(found[name], product, rtol=1e-12, atol=1e-9)


def blocks(head: str, count: int, inner: Iterable[str]) -> list[str]:
    return [f"{head}.{n}.{name}" for n in range(count) for name in inner]


ATTENTION = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"]
WAN = [*ATTENTION, "ffn.0", "ffn.2"]
PICTURE = ["cross_attn.k_img", "cross_attn.v_img"]
WAN_TOP = ["time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2"]
WAN_TOP += ["time_projection.1", "head.head"]

DOUBLE = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
QWEN = [f"attn.{name}" for name in [*DOUBLE, "to_add_out"]]
QWEN += [f"{s}_{name}" for s in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")]
QWEN_TOP = ["img_in", "txt_in", "proj_out", "norm_out.linear"]
QWEN_TOP += [f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)]

GATED = [f"feed_forward.w{n}" for n in (1, 2, 3)]
SPLIT = [*(f"attention.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")), *GATED]
FUSED = ["attention.qkv", "attention.out", *GATED]

LTX = [f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")]
LTX += ["ff.net.0.proj", "ff.net.2"]
TIME = ["emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"]
SOUND = [f"audio_{name}" for name in LTX]
SOUND += [f"{a}_attn.{n}" for a in ("audio_to_video", "video_to_audio") for n in DOUBLE[:4]]
ADALN = [f"{who}adaln_single" for who in ("", "audio_", "av_ca_a2v_gate_", "av_ca_v2a_gate_")]
ADALN += [f"av_ca_{who}_scale_shift_adaln_single" for who in ("video", "audio")]
PROMPT = ["prompt_adaln_single", "audio_prompt_adaln_single"]

KREA = [f"attn.{n}" for n in ("wq", "wk", "wv", "wo", "gate")]
KREA += [f"mlp.{n}" for n in ("gate", "up", "down")]
KREA_TOP = ["first", "last.linear", "tmlp.0", "tmlp.2", "tproj.1", "txtmlp.1", "txtmlp.3"]

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
ANIMA = [f"{a}_attn.{n}" for a in ("self", "cross") for n in [*PROJECTIONS, "output_proj"]]
ANIMA += [f"adaln_modulation_{p}.{n}" for p in ("self_attn", "cross_attn", "mlp") for n in (1, 2)]
ANIMA += ["mlp.layer1", "mlp.layer2"]
ANIMA_TOP = ["x_embedder.proj.1", "t_embedder.1.linear_1", "t_embedder.1.linear_2"]
ANIMA_TOP += ["final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2"]
ADAPTER = [f"{a}_attn.{n}" for a in ("self", "cross") for n in [*PROJECTIONS, "o_proj"]]
ADAPTER += ["mlp.0", "mlp.2"]


class Case(NamedTuple):
    """names: without the prefix; the rest as in :func:`write`."""

    owner: str
    convert: Convert
    names: list[str]
    prefix: str = "diffusion_model."
    suffixes: tuple[str, str] = A_B
    alpha: float | None = None
    flat: bool = False


wan = conversion._convert_non_diffusers_wan_lora_to_diffusers
musubi = conversion._convert_musubi_wan_lora_to_diffusers
qwen = conversion._convert_non_diffusers_qwen_lora_to_diffusers
z_image = conversion._convert_non_diffusers_z_image_lora_to_diffusers
lumina2 = conversion._convert_non_diffusers_lumina2_lora_to_diffusers
ltxv = conversion._convert_non_diffusers_ltxv_lora_to_diffusers
ltx2 = conversion._convert_non_diffusers_ltx2_lora_to_diffusers
krea2 = conversion._convert_non_diffusers_krea2_lora_to_diffusers
anima = conversion._convert_non_diffusers_anima_lora_to_diffusers


def refiners(inner: list[str], noise: list[str]) -> list[str]:
    names = blocks("layers", 3, [*inner, *noise])
    return (
        names + blocks("noise_refiner", 2, [*inner, *noise]) + blocks("context_refiner", 2, inner)
    )


LUMINA2 = refiners(FUSED, ["adaLN_modulation.1"])
SPLIT_REFINERS = refiners(SPLIT, ["adaLN_modulation.0"])
KREA2 = [*blocks("blocks", 2, KREA), *blocks("txtfusion.layerwise_blocks", 2, KREA)]
KREA2 += [*blocks("txtfusion.refiner_blocks", 2, KREA), "txtfusion.projector", *KREA_TOP]
LTX2 = [*blocks("transformer_blocks", 2, LTX + SOUND), "patchify_proj", "audio_patchify_proj"]
LTX2 += ["proj_out", "audio_proj_out", *(f"{a}.{t}" for a in ADALN for t in TIME)]
LTX23 = [f"{a}.{t}" for a in PROMPT for t in TIME] + [n for n in LTX2 if "adaln" not in n]
LTX23 += [f"transformer_blocks.0.{n}.to_gate_logits" for n in ("attn1", "audio_attn2")]
PROJECTION = [f"caption_projection.linear_{n}" for n in (1, 2)]

CASES = {
    "wan 14B, diffusion-pipe": Case("wan-14b", wan, blocks("blocks", 2, WAN)),
    "wan 14B, with pictures": Case(
        "wan-14b",
        wan,
        [*blocks("blocks", 2, WAN + PICTURE), *WAN_TOP, "img_emb.proj.1", "img_emb.proj.3"],
    ),
    "wan 5B, α and lora_down": Case(
        "wan-5b", wan, blocks("blocks", 2, WAN), suffixes=DOWN_UP, alpha=ALPHA
    ),
    "wan 1.3B, musubi": Case(
        "wan-1.3b", musubi, blocks("blocks", 2, WAN), "lora_unet_", DOWN_UP, ALPHA, flat=True
    ),
    "wan 14B, musubi with pictures": Case(
        *("wan-14b", musubi, blocks("blocks", 1, WAN + PICTURE), "lora_unet_", DOWN_UP, ALPHA),
        flat=True,
    ),
    "qwen, musubi": Case(
        *("qwen-image", qwen, blocks("transformer_blocks", 2, QWEN) + QWEN_TOP, "lora_unet_"),
        *(DOWN_UP, ALPHA),
        flat=True,
    ),
    "qwen, Lightning": Case(
        "qwen-image", qwen, blocks("transformer_blocks", 2, QWEN), "", DOWN_UP, ALPHA
    ),
    "qwen, DiffSynth": Case(
        "qwen-image", qwen, blocks("transformer_blocks", 2, QWEN), "", NAMED, None
    ),
    "qwen, ai-toolkit": Case("qwen-image", qwen, blocks("transformer_blocks", 2, QWEN)),
    "qwen, A and B with α": Case(
        "qwen-image", qwen, blocks("transformer_blocks", 1, QWEN), "", A_B, ALPHA
    ),
    "z-image, musubi": Case(
        "z-image", z_image, SPLIT_REFINERS, "lora_unet_", DOWN_UP, ALPHA, flat=True
    ),
    "z-image, ai-toolkit": Case("z-image", z_image, SPLIT_REFINERS),
    "z-image, DiffSynth": Case("z-image", z_image, blocks("layers", 2, SPLIT), "", NAMED),
    "z-image, for ComfyUI": Case(
        *("z-image", z_image, blocks("layers", 2, FUSED), "lora_unet_", DOWN_UP, ALPHA), flat=True
    ),
    "lumina2": Case("lumina2", lumina2, LUMINA2),
    "ltxv 2B": Case("ltxv-2b", ltxv, blocks("transformer_blocks", 2, LTX) + PROJECTION),
    "ltxv 13B": Case("ltxv-13b", ltxv, blocks("transformer_blocks", 2, LTX) + PROJECTION),
    "ltx-2": Case("ltx-2", ltx2, LTX2),
    "ltx-2.3": Case("ltx-2.3", ltx2, LTX23),
    "krea2": Case("krea2", krea2, KREA2),
    "krea2, ai-toolkit": Case("krea2", krea2, KREA2, "base_model.model."),
    "anima": Case("anima", anima, blocks("blocks", 2, ANIMA) + ANIMA_TOP + ["final_layer.linear"]),
    "anima, between": Case("anima", anima, blocks("llm_adapter.blocks", 2, ADAPTER)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_modules_are_those_of_diffusers(case: Case) -> None:
    factors = draw(case.owner, case.names, case.alpha)
    file = write(factors, case.prefix, case.suffixes, case.alpha, case.flat)
    assert_same(ours(case.owner, factors), theirs(case.convert(file)))


def test_the_ways_into_ltx2_that_are_no_part_of_its_transformer() -> None:
    """diffusers keeps them under ``connectors.``; it calls for them by another prefix."""
    for owner, names in (
        ("ltx-2", ["aggregate_embed"]),
        ("ltx-2.3", ["video_aggregate_embed", "audio_aggregate_embed"]),
    ):
        factors = draw(owner, [f"text_embedding_projection.{name}" for name in names], None)
        converted = ltx2(write(factors, ""), "text_embedding_projection")
        assert_same(ours(owner, factors), theirs(converted))


def test_rows_of_the_final_layers_of_lumina2() -> None:
    """diffusers' converter of adapters refuses the final layer, which sd-scripts trains; the names
    are those of its converter of checkpoints.
    """
    names = [*LUMINA2, "final_layer.linear", "final_layer.adaLN_modulation.1"]
    factors = draw("lumina2", names, None)
    with pytest.raises(ValueError, match="should be empty"):
        lumina2(write(factors, "diffusion_model."))
    found = set(ours("lumina2", factors)) - set(ours("lumina2", draw("lumina2", LUMINA2, None)))
    assert found == {"norm_out.linear_1", "norm_out.linear_2"}


def test_alpha_outside_the_blocks_of_wan() -> None:
    """diffusers knows alpha inside the blocks alone and refuses a file that has it elsewhere."""
    factors = draw("wan-14b", [*blocks("blocks", 1, WAN), *WAN_TOP], ALPHA)
    with pytest.raises(ValueError, match="should be empty"):
        wan(write(factors, "diffusion_model.", DOWN_UP, ALPHA))
    assert ours("wan-14b", factors).keys() >= {"proj_out", "condition_embedder.time_proj"}


def test_the_ends_of_ltxv() -> None:
    """diffusers takes the prefix off and leaves the original names of the ends, which none of its
    modules has. Ours are those of its converter of checkpoints.
    """
    names = ["patchify_proj", *(f"adaln_single.{t}" for t in TIME)]
    factors = draw("ltxv-2b", names, None)
    assert theirs(ltxv(write(factors, "diffusion_model."))).keys() == set(names)
    assert set(ours("ltxv-2b", factors)) == {"proj_in", *(f"time_embed.{t}" for t in TIME)}


def test_fused_attention_of_z_image_with_dots() -> None:
    """diffusers splits it in flattened names alone; with dots it keeps a module that its model does
    not have. The rows are those of the flattened spelling.
    """
    factors = draw("z-image", ["layers.0.attention.qkv"], None)
    dotted = theirs(z_image(write(factors, "diffusion_model.")))
    assert set(dotted) == {"layers.0.attention.qkv"}
    flat = theirs(z_image(write(factors, "lora_unet_", DOWN_UP, flat=True)))
    assert_same(ours("z-image", factors), flat)


def test_flattened_names_of_anima() -> None:
    """diffusers hands them through as they are, and nothing has those names."""
    factors = draw("anima", blocks("blocks", 1, ANIMA), ALPHA)
    file = write(factors, "lora_unet_", DOWN_UP, ALPHA, flat=True)
    assert anima(dict(file)).keys() == file.keys()
    dotted = theirs(anima(write(factors, "diffusion_model.")))
    scaled = {name: ALPHA / RANK * product for name, product in dotted.items()}
    assert_same(ours("anima", factors), scaled)


def test_modulation_of_wan_in_a_distilled_adapter() -> None:
    """LightX2V writes the change of a block's modulation as ``blocks.0.diff_m``; diffusers drops
    it. Its shape [1, 6, width] is one row.
    """
    factors = draw("wan-14b", blocks("blocks", 1, WAN), None)
    file = write(factors, "diffusion_model.")
    file["diffusion_model.blocks.0.diff_m"] = torch.zeros(1, 6, 5120)
    file["diffusion_model.head.diff_m"] = torch.zeros(1, 2, 5120)
    assert_same(ours("wan-14b", factors), theirs(wan(file)))
    for name, path, times in (
        ("blocks.0", "blocks.0.scale_shift_table", 6),
        ("head", "scale_shift_table", 2),
    ):
        found = entry("wan-14b", name)
        assert [part.path for part in found.parts] == [path]
        assert found.fits((1, times * 5120), "weight")


def test_the_norm_before_the_cross_attention_of_wan() -> None:
    """The third norm of the original code is the second of diffusers; adapters hold its change,
    which diffusers drops.
    """
    assert entry("wan-14b", "blocks.3.norm3").path == "blocks.3.norm2"
    assert entry("wan-14b", "blocks.3.norm2").path == "blocks.3.norm2"
    assert entry("wan-14b", "blocks.3.norm3").fits((5120, 1), "norm")
