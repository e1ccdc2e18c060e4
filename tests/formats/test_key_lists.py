"""Key lists of real files, filled with random numbers: all accounted for, the model told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from lorafind.files.safetensors import TensorInfo
from lorafind.formats.plan import understand
from lorafind.formats.read import open_adapter, read
from lorafind.relations.verify import prove


class Told(NamedTuple):
    """What a list must give: architecture, family, spelling, number of modules."""

    architecture: str
    family: str
    spelling: str
    modules: int


EXPECTED = {
    # Written by hand, with a cross attention of a width that the model does not have.
    "anima-dotted-peft": Told("other:", "lora", "comfy", 6),
    "anima-kohya-te": Told("other:", "lora", "kohya", 9),
    "chroma-aitoolkit": Told("flux1-or-chroma", "lora", "comfy", 418),
    "flux1-bfl-control": Told("flux1", "lora", "native", 1010),
    "flux1-bfl-dotted-peft": Told("flux1-or-chroma", "lora", "comfy", 418),
    "flux1-diffusers": Told("flux1", "lora", "diffusers", 494),
    "flux1-kohya": Told("flux1", "lora", "kohya", 494),
    "flux1-kohya-diffusersnames-trailing-underscore": Told("flux1", "lora", "kohya", 228),
    "flux1-kohya-te1": Told("flux1", "lora", "kohya", 494 + 72),
    "flux1-peft-base-model": Told("flux1-or-chroma", "lora", "peft", 381),
    "flux1-xlabs": Told("flux1", "lora", "xlabs", 24),
    "flux2-dev-aitoolkit": Told("flux2-dev", "lora", "comfy", 192),
    "flux2-klein9b-bfl-lokr": Told("flux2-klein-9b", "lokr", "comfy", 144),
    "hunyuanvideo-comfy-extracted-diffb": Told("hunyuanvideo", "lora", "comfy", 1040),
    "hunyuanvideo-diffusionpipe": Told("hunyuanvideo", "lora", "native", 520),
    "hunyuanvideo-musubi": Told("hunyuanvideo", "lora", "kohya", 440),
    "krea2-native-dotted": Told("krea2", "lora", "comfy", 224),
    "ltxv-2b-diffusers": Told("ltxv-2b", "lora", "diffusers", 224),
    "lumina2-kohya": Told("lumina2", "lora", "kohya", 240),
    # Three layers of the attention, 3072 wide.
    "qwen-bare-diffusers": Told(
        "flux1-or-chroma-or-flux2-klein-4b-or-hunyuanvideo-or-qwen-image", "lora", "bare", 3
    ),
    "qwen-peft-default-adapter": Told("qwen-image", "lora", "peft", 840),
    "sd35-large-kohya-te123": Told("sd3.5-large", "lora", "kohya", 962),
    "sd35-medium-diffusers": Told("sd3.5-medium", "lora", "diffusers", 243),
    "wan21-14b-t2v-diffusion-pipe": Told("wan-14b", "lora", "comfy", 400),
    "wan22-5b-musubi": Told("wan-5b", "lora", "kohya", 300),
    "zimage-comfy-fused-qkv": Told("z-image", "lora", "kohya", 210),
    "zimage-lycoris-lokr": Told("z-image", "lokr", "kohya", 240),
    "zimage-musubi": Told("z-image", "lora", "kohya", 210),
}
#: Lists without shapes.
BARE = {"qwen-kohya-lokr"}


def shapes(shared: Path, name: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((shared / f"loras/keys/{name}.json").read_text())[
        "keys"
    ]
    return found


def test_no_list_is_left_out(shared: Path) -> None:
    assert {path.stem for path in (shared / "loras/keys").glob("*.json")} == set(EXPECTED) | BARE


@pytest.mark.parametrize("name", EXPECTED)
def test_what_names_and_shapes_tell(shared: Path, name: str) -> None:
    keys = shapes(shared, name)
    plan = understand({k: TensorInfo("F16", tuple(s), 0, 0) for k, s in keys.items()}, {})
    told = EXPECTED[name]
    assert plan.architecture.startswith(told.architecture)
    assert told.architecture == "other:" or plan.architecture == told.architecture
    assert (plan.family, plan.spelling) == (told.family, told.spelling)
    assert len(plan.modules) == told.modules
    assert set(plan.keys) == set(keys) and not plan.unread_keys
    strangers = [m.name for m in plan.modules if m.name.startswith("model/")]
    assert bool(strangers) == (told.architecture == "other:")
    assert plan.notes == ()


def rank(keys: dict[str, list[int]]) -> dict[str, list[int]]:
    """The same with low-rank factors of rank 1, so that the files are small."""
    found = {}
    for key, shape in keys.items():
        word = key.removesuffix(".weight").rpartition(".")[2].rpartition("_")[2]
        if word in ("down", "A", "default") and "lora" in key and "lora_B" not in key:
            found[key] = [1, *shape[1:]]
        elif word in ("up", "B", "default") and "lora" in key:
            found[key] = [shape[0], 1, *shape[2:]]
        else:
            found[key] = shape
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("flux1-kohya-te1", "flux1-xlabs", "flux1-bfl-control", "flux2-klein9b-bfl-lokr"),
        *("hunyuanvideo-comfy-extracted-diffb", "lumina2-kohya", "wan22-5b-musubi"),
        *("zimage-comfy-fused-qkv", "zimage-lycoris-lokr", "qwen-peft-default-adapter"),
        *("sd35-large-kohya-te123", "krea2-native-dotted"),
    ],
)
def test_filled_lists_are_read_and_equal_content_is_equal(
    shared: Path, tmp_path: Path, name: str
) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(shape, generator=g).half()
        for key, shape in rank(shapes(shared, name)).items()
    }
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", {"title": "another"})
    one, two = (read(tmp_path / f"{x}.safetensors") for x in "ab")
    assert (one.outcome, one.reason) == ("lora", "")
    assert one.plan is not None and one.adapter is not None
    assert one.plan.architecture == EXPECTED[name].architecture
    assert len(one.adapter.modules) == EXPECTED[name].modules
    assert not any(delta.is_zero for delta in one.adapter.modules.values())
    assert one.content == two.content and one.sha256 != two.sha256
    relation = prove(
        open_adapter(tmp_path / "a.safetensors"), open_adapter(tmp_path / "b.safetensors")
    )
    assert relation is not None and relation.grade == "tensors"


#: Layers whose shapes the hand-written lists have wrong, as the published models have them.
MENDED = {
    "cross_attn_k_proj": (2048, 1024),
    "cross_attn_v_proj": (2048, 1024),
    "te_layers_0_self_attn_q_proj": (2048, 1024),
    "te_layers_0_self_attn_o_proj": (1024, 2048),
    "te_layers_0_mlp_gate_proj": (3072, 1024),
    "te_layers_0_mlp_up_proj": (3072, 1024),
    "te_layers_0_mlp_down_proj": (1024, 3072),
}


@pytest.mark.parametrize(
    ("name", "architecture", "modules"),
    [
        ("anima-dotted-peft", "anima-or-cosmos-predict2-2b", 6),
        ("anima-kohya-te", "anima", 9),
    ],
)
def test_hand_written_lists_with_the_widths_of_the_model(
    shared: Path, name: str, architecture: str, modules: int
) -> None:
    headers = {}
    for key, shape in shapes(shared, name).items():
        stem = key.removesuffix(".weight").rpartition(".")[0].replace(".", "_")
        layer = next((s for layer, s in MENDED.items() if stem.endswith(layer)), None)
        if layer is not None and shape:
            down = "lora_A" in key or "lora_down" in key
            shape = [shape[0], layer[1]] if down else [layer[0], shape[1]]
        headers[key] = TensorInfo("F16", tuple(shape), 0, 0)
    plan = understand(headers, {})
    assert plan.architecture == architecture and len(plan.modules) == modules
    assert not plan.unread_keys and not any(m.name.startswith("model/") for m in plan.modules)


def test_a_list_without_shapes_with_those_of_the_model(shared: Path) -> None:
    """Qwen-Image's LoKr: of each layer, w1 of 4 × 4 and what is left for w2."""
    widths = {"img_mlp_net_0_proj": (12288, 3072), "txt_mlp_net_2": (3072, 12288)}
    headers = {}
    for key in shapes(shared, "qwen-kohya-lokr"):
        stem, role = key.split(".")
        o, n = next((s for layer, s in widths.items() if stem.endswith(layer)), (3072, 3072))
        shape = {"lokr_w1": (4, 4), "lokr_w2": (o // 4, n // 4), "alpha": ()}[role]
        headers[key] = TensorInfo("BF16", shape, 0, 0)
    plan = understand(headers, {})
    assert (plan.architecture, plan.family, plan.spelling) == ("qwen-image", "lokr", "kohya")
    assert len(plan.modules) == 8 and not plan.unread_keys
