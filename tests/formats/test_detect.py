"""The architecture from names and shapes, and what stays open."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import TensorInfo
from lorafind.formats.adapter import Plan
from lorafind.formats.names import clip, unet
from lorafind.formats.plan import understand

SD3 = "sd3-or-sd3.5-medium-or-sd3.5-large"


def tensors(rows: Iterable[tuple[str, int, int]], conv: bool = False) -> dict[str, TensorInfo]:
    """Headers of LoRA factors of rank 4 for (stem, o, n)."""
    found = {}
    one = (1, 1) if conv else ()
    for stem, o, n in rows:
        found[f"{stem}.lora_down.weight"] = TensorInfo("F16", (4, n, *one), 0, 0)
        found[f"{stem}.lora_up.weight"] = TensorInfo("F16", (o, 4, *one), 0, 0)
    return found


def of(
    architecture: str, keep: Callable[[str], bool], original: bool = False, prefix: str = "unet."
) -> list[tuple[str, int, int]]:
    """The weights of a U-Net whose path is kept."""
    return [
        (prefix + (layer.sgm if original else layer.path), *layer.shape)
        for layer in unet.layers(unet.UNETS[architecture])
        if not layer.norm and keep(layer.path)
    ]


def text(component: str, prefix: str) -> list[tuple[str, int, int]]:
    return [
        (prefix + path.replace(".", "_"), *shape)
        for path, shape, norm in clip.layers(component)
        if ".layers." in path and not norm
    ]


def plan(rows: list[tuple[str, int, int]]) -> Plan:
    return understand(tensors(rows), {}, None)


@pytest.mark.parametrize("architecture", list(unet.UNETS))
@pytest.mark.parametrize("original", [False, True])
def test_every_layer_of_every_unet(architecture: str, original: bool) -> None:
    found = plan(of(architecture, lambda p: True, original))
    assert found.architecture == architecture
    assert found.notes == ()
    true = {f"unet/{x.path}" for x in unet.layers(unet.UNETS[architecture]) if not x.norm}
    assert {m.name for m in found.modules} == true
    assert set(found.keys.values()) == {f"module:{name}" for name in true}


@pytest.mark.parametrize("architecture", list(unet.UNETS))
def test_cross_attention_alone_tells(architecture: str) -> None:
    """The width of the prompt, of a single layer."""
    path = next(p for p, _, _ in of(architecture, lambda p: p.endswith("attn2.to_k")))
    assert plan(of(architecture, lambda p: f"unet.{p}" == path)).architecture == architecture


@pytest.mark.parametrize(
    ("architecture", "keep", "found"),
    [
        ("sd1", lambda p: "attn1" in p, "sd1-or-sd2"),
        ("sd2", lambda p: "attn1" in p, "sd1-or-sd2"),
        ("sd1", lambda p: "mid_block" in p and "attn1" in p, "sd1-or-sd2-or-sdxl"),
        ("sd1", lambda p: "down_blocks.1" in p and "attn1" in p, "sd1-or-sd2-or-sdxl"),
        ("sdxl", lambda p: "mid_block" in p and "blocks.0.attn1" in p, "sd1-or-sd2-or-sdxl"),
        ("sdxl", lambda p: "mid_block" in p and "blocks.4.attn1" in p, "sdxl"),
        ("sdxl", lambda p: "up_blocks.0.attentions.0.transformer_blocks.0.attn1" in p, "sdxl"),
        ("sdxl-refiner", lambda p: "down_blocks.1" in p and "attn1" in p, "sdxl-refiner"),
        ("sdxl", lambda p: p == "up_blocks.0.resnets.2.conv1", "sdxl"),
        ("sd1", lambda p: p == "up_blocks.0.resnets.2.conv1", "sd1-or-sd2"),
        ("sdxl", lambda p: "add_embedding" in p, "sdxl"),
        ("sdxl-refiner", lambda p: "add_embedding.linear_1" in p, "sdxl-refiner"),
    ],
)
def test_parts(architecture: str, keep: Callable[[str], bool], found: str) -> None:
    assert plan(of(architecture, keep)).architecture == found


def test_one_layer_among_many_tells() -> None:
    rows = of("sd1", lambda p: "attn1" in p or ("down_blocks.0.attentions.0" in p and "attn2" in p))
    assert plan(rows).architecture == "sd1"


def test_projections_of_four_dimensions_are_sd1s() -> None:
    rows = of("sd1", lambda p: "attn1" in p or "proj_in" in p)
    projections = [row for row in rows if "proj_in" in row[0]]
    others = [row for row in rows if "proj_in" not in row[0]]
    conv = tensors(projections, conv=True) | tensors(others)
    assert understand(conv, {}, None).architecture == "sd1"
    assert understand(tensors(rows), {}, None).architecture == "sd2"


@pytest.mark.parametrize(
    ("rows", "architecture", "component"),
    [
        (text("te1", "lora_te_"), "sd1", "te1"),
        (text("te", "lora_te_"), "sd2", "te"),
        (text("te2", "lora_prior_te_"), "cascade-or-cascade-lite", "te2"),
        # OneTrainer's kohya names no longer say "prior"; the refiner has the same encoder.
        (text("te2", "lora_te_"), "sdxl-refiner-or-cascade-or-cascade-lite", "te2"),
        (text("te2", "lora_te2_"), f"sdxl-or-{SD3}-or-hidream", "te2"),
        (
            text("te1", "lora_te1_"),
            f"sd1-or-sdxl-or-flux1-or-hunyuanvideo-or-{SD3}-or-hidream",
            "te1",
        ),
        (
            text("te1", "lora_te1_") + text("te2", "lora_te2_"),
            f"sdxl-or-{SD3}-or-hidream",
            "te1 te2",
        ),
    ],
)
def test_text_encoders_alone(
    rows: list[tuple[str, int, int]], architecture: str, component: str
) -> None:
    found = plan(rows)
    assert found.architecture == architecture
    assert {m.place.component for m in found.modules} == set(component.split())
    assert {m.place.group for m in found.modules} == {"text"}
    late = [m for m in found.modules if m.place.late]
    assert abs(len(late) * 2 - len(found.modules)) <= 6


def test_a_text_encoder_decides_what_the_unet_leaves_open() -> None:
    rows = of("sd1", lambda p: "attn1" in p, prefix="lora_unet_")
    assert plan(rows + text("te", "lora_te_")).architecture == "sd2"
    assert plan(rows + text("te1", "lora_te1_")).architecture == "sd1"


def test_a_foreign_text_encoder_is_said() -> None:
    found = plan(of("sd1", lambda p: "attn" in p, prefix="lora_unet_") + text("te", "lora_te_"))
    assert found.architecture == "sd1"
    assert any("text encoder" in note for note in found.notes)


def test_sdxl_with_both_encoders() -> None:
    rows = of("sdxl", lambda p: "attn" in p, original=True, prefix="lora_unet_")
    rows += text("te1", "lora_te1_") + text("te2", "lora_te2_")
    found = plan(rows)
    assert (found.architecture, found.spelling, found.notes) == ("sdxl", "sgm", ())
    assert len(found.modules) == len(rows)


def test_pruned_sdxl_is_sdxl() -> None:
    """SSD-1B and its like leave blocks out and change no shape."""
    rows = of("sdxl", lambda p: "mid_block" not in p and "transformer_blocks.0." in p)
    assert plan(rows).architecture == "sdxl"


def test_a_widened_first_convolution_has_a_name_of_its_own() -> None:
    """Inpainting models read 9 channels: not the layer of the plain model."""
    rows = of("sd1", lambda p: "attn" in p or p == "conv_in")
    rows = [(s, o, 9 * 9 if s.endswith("conv_in") else n) for s, o, n in rows]
    found = plan(rows)
    assert found.architecture == "sd1"
    assert "unet/conv_in[320×81]" in {m.name for m in found.modules}


def test_other_widths_are_another_model() -> None:
    rows = [(s, o // 10, n // 8) for s, o, n in of("sd1", lambda p: "attn" in p)]
    found = plan(rows)
    assert found.architecture.startswith("other:")
    assert found.architecture != plan([(s, o, n * 2) for s, o, n in rows]).architecture


def test_strange_modules_beside_known_ones_are_kept_and_said() -> None:
    found = plan([*of("sd1", lambda p: "attn" in p), ("unet.extra.layer", 64, 64)])
    assert found.architecture == "sd1"
    assert "model/extra_layer" in {m.name for m in found.modules}
    assert any("not part of sd1" in note for note in found.notes)


def test_metadata_never_decides() -> None:
    rows = tensors(of("sd1", lambda p: "attn" in p))
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "flux-1-dev"}
    assert understand(rows, metadata, None).architecture == "sd1"


def test_groups_of_sd1_are_the_papers() -> None:
    """160 layers in three groups, the projections apart; half of the depth each."""
    found = plan(of("sd1", lambda p: ".attentions." in p))
    count = {g: sum(m.place.group == g for m in found.modules) for g in ("self_attn", "ff")}
    assert count == {"self_attn": 64, "ff": 32}
    assert sum(m.place.group == "cross_attn" for m in found.modules) == 64
    late = {m.name.split(".")[0] for m in found.modules if m.place.late}
    assert late == {"unet/mid_block", "unet/up_blocks"}
    numbers = sum(
        4 * 4 * (m.shape[0] + m.shape[1])
        for m in found.modules
        if m.place.group in ("self_attn", "cross_attn", "ff")
    )
    assert numbers == 5_984_256  # A and B at rank 16, as published


@pytest.mark.parametrize(
    ("names", "outcome"),
    [
        ({"emb_params": (4, 768)}, "embedding"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embedding"),
        ({"<token>": (1024,)}, "embedding"),
        ({"string_to_param.*": (4, 768)}, "embedding"),
        ({"model.diffusion_model.out.2.weight": (4, 320, 3, 3)}, "checkpoint"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "checkpoint"),
        (
            {
                "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
                "quant_conv.weight": (8, 8, 1, 1),
            },
            "vae",
        ),
        (
            {"768.0.linear.0.weight": (1536, 768), "768.1.linear.0.weight": (768, 1536)},
            "hypernetwork",
        ),
        ({"lora_controlnet": (0,), "input_blocks.1.0.in_layers.2.down": (4, 320)}, "controlnet"),
        ({"lllite_unet_input_blocks_1.down.0.weight": (4, 4)}, "controlnet"),
        ({"lllite_dit_blocks_0_self_attn_q_proj.down.0.weight": (4, 4)}, "controlnet"),
        ({"down_blocks.0.motion_modules.0.norm.weight": (320,)}, "checkpoint"),
        ({"control_model.input_blocks.0.0.weight": (4, 4)}, "controlnet"),
        ({"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}, "unsupported"),
        ({"w_a_000": (4, 768), "w_a_001": (4, 768)}, "unsupported"),
        ({"a.lora_up.weight": (4, 2), "a.alpha": ()}, "unsupported"),
    ],
)
def test_what_is_no_adapter_is_named(names: dict[str, tuple[int, ...]], outcome: str) -> None:
    headers = {name: TensorInfo("F16", shape, 0, 0) for name, shape in names.items()}
    with pytest.raises(NotAnAdapter) as caught:
        understand(headers, {}, None)
    assert caught.value.outcome == outcome
    assert caught.value.reason
