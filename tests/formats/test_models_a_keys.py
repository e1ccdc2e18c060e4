"""Key lists of LoRA files of the Flux, HunyuanVideo and SD3 families: every name is in its table,
with the shape that it has there.
"""

from __future__ import annotations

import json
import pathlib
import re

import pytest

from lorafind.formats.names import tables
from lorafind.formats.names.table import flatten

Shape = tuple[int, ...]

#: File → table, modules found.
LISTS = {
    "chroma-aitoolkit": ("chroma", 228),
    "flux1-bfl-control": ("flux1", 466),
    "flux1-bfl-dotted-peft": ("flux1", 228),
    "flux1-diffusers": ("flux1", 494),
    "flux1-kohya": ("flux1", 304),
    "flux1-kohya-diffusersnames-trailing-underscore": ("flux1", 228),
    "flux1-kohya-te1": ("flux1", 304),
    "flux1-peft-base-model": ("flux1", 381),
    "flux1-xlabs": ("flux1", 12),
    "flux2-dev-aitoolkit": ("flux2-dev", 160),
    "flux2-klein9b-bfl-lokr": ("flux2-klein-9b", 112),
    "hunyuanvideo-comfy-extracted-diffb": ("hunyuanvideo", 320),
    "hunyuanvideo-diffusionpipe": ("hunyuanvideo", 320),
    "hunyuanvideo-musubi": ("hunyuanvideo", 240),
    "sd35-large-kohya-te123": ("sd3.5-large", 377),
    "sd35-medium-diffusers": ("sd3.5-medium", 243),
}

PREFIX = re.compile(r"^(lora_unet_|transformer\.|diffusion_model\.|base_model\.model\.)")
ENCODER = re.compile(r"^lora_te\d_")
SUFFIX = re.compile(
    r"\.(lora_down\.weight|lora_up\.weight|lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|down\.weight|up\.weight|alpha|lokr_w1|lokr_w2|diff_b|scale)$"
)


def sizes(tensors: dict[str, Shape]) -> dict[str, tuple[int, int]]:
    """Kind → shape of ΔW of one module, from the shapes of its tensors."""
    found = {}
    for down, up in (
        ("lora_down.weight", "lora_up.weight"),
        ("lora_A.weight", "lora_B.weight"),
        ("down.weight", "up.weight"),
    ):
        if down in tensors:
            assert tensors[down][0] == tensors[up][1]
            found["weight"] = (tensors[up][0], tensors[down][1])
    if "lokr_w1" in tensors:
        (a, b), (c, d) = tensors["lokr_w1"], tensors["lokr_w2"]
        found["weight"] = (a * c, b * d)
    for bias in ("lora_B.bias", "diff_b"):
        if bias in tensors:
            found["bias"] = (tensors[bias][0], 1)
    if "scale" in tensors:
        found["norm"] = (tensors["scale"][0], 1)
    return found


@pytest.mark.parametrize("name", list(LISTS))
def test_every_name_of_a_key_list(name: str, shared: pathlib.Path) -> None:
    owner, count = LISTS[name]
    keys = json.loads((shared / "loras" / "keys" / f"{name}.json").read_text("utf-8"))["keys"]
    modules: dict[str, dict[str, Shape]] = {}
    for key, shape in keys.items():
        suffix = SUFFIX.search(key)
        assert suffix is not None, key
        if not ENCODER.match(key):
            stem = PREFIX.sub("", key[: suffix.start()])
            modules.setdefault(stem, {})[suffix[1]] = tuple(shape)
    wrong = []
    for stem, tensors in modules.items():
        entry = tables.index().get(flatten(stem)).get(owner)
        kinds = sizes(tensors)
        assert kinds, stem
        if entry is None or not all(entry.fits(size, kind) for kind, size in kinds.items()):
            wrong.append((stem, kinds))
    assert wrong == []
    assert len(modules) == count


def test_all_lists_of_these_families_are_read(shared: pathlib.Path) -> None:
    families = ("chroma", "flux", "hunyuan", "sd3", "auraflow")
    files = (shared / "loras" / "keys").glob("*.json")
    assert {file.stem for file in files if file.stem.startswith(families)} == set(LISTS)
