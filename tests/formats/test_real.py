"""Files that strangers made, broken files, FontBench, and key lists of published files."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorafind.formats.read import open_adapter, read

#: What MANIFEST.json calls each kind → our outcome, and its architectures → ours.
OUTCOMES = {
    "indexed": "lora",
    "textual inversion embedding": "embedding",
    "plain network weights, no adapter": "checkpoint",
    "LoRA for a vision transformer, not for a text-to-image model": "unsupported",
    "truncated safetensors": "unreadable",
    "git LFS pointer": "lfs-pointer",
    "text file": "text",
    "refused: unsafe pickle": "pickle",
    "valid safetensors without tensors": "empty",
}
ARCHITECTURES = {"SD1": "sd1", "SD2": "sd2", "lan": "other:"}


def manifest(shared: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((shared / "loras/real/MANIFEST.json").read_text())
    return found


def expected(entry: dict[str, Any]) -> str:
    if entry.get("all_zero"):
        return "zero"
    if entry["outcome"].startswith("PEFT"):
        return "unsupported" if "other" in entry["format"] else "lora"
    return OUTCOMES[entry["outcome"]]


def test_real_files(shared: Path) -> None:
    for entry in manifest(shared):
        path = shared / "loras/real" / entry["file"]
        reading = read(path, allow_pickle=True)
        assert reading.outcome == expected(entry), entry["file"]
        assert bool(reading.reason) == (reading.outcome != "lora"), entry["file"]
        if reading.plan is None or reading.plan.family == "ia3":
            continue
        assert reading.adapter is not None
        assert reading.sha256 == entry["sha256"]
        assert reading.plan.architecture.startswith(ARCHITECTURES[entry["architecture"][:3]])
        assert len(reading.plan.modules) == entry["n_modules"]
        ranks = {str(m.rank) for m in reading.plan.modules}
        assert ranks == set(entry["ranks"])
        assert not reading.plan.unknown_keys
        norm = math.sqrt(sum(d.squared_norm() for d in reading.adapter.modules.values()))
        assert norm == pytest.approx(entry["deltaW_frobenius_norm"], rel=5e-5)
        if reading.plan.family != "lora":
            continue
        zero = sum(delta.is_zero for delta in reading.adapter.modules.values())
        assert zero == entry.get("modules_with_zero_up", 0)


def test_pickles_need_to_be_allowed(shared: Path) -> None:
    for entry in manifest(shared):
        if not entry["file"].endswith(".safetensors"):
            reading = read(shared / "loras/real" / entry["file"])
            assert reading.outcome == "pickle"
            assert "--allow-pickle" in reading.reason


def test_known_relations_show_in_the_modules(shared: Path) -> None:
    """Canonical names line up what spellings and orders hide: exact cosines are those published."""

    def cosine(a: str, b: str) -> tuple[float, int]:
        one = open_adapter(shared / "loras/real" / a, allow_pickle=True).modules
        two = open_adapter(shared / "loras/real" / b, allow_pickle=True).modules
        names = set(one) & set(two)
        dot = norm_one = norm_two = 0.0
        for name in names:
            x, y = one[name].dense(torch.float32), two[name].dense(torch.float32)
            dot += float((x * y).sum())
            norm_one += float(x.square().sum())
            norm_two += float(y.square().sum())
        return dot / math.sqrt(norm_one * norm_two), len(names)

    first = "sd1_diffusers_timohavdk_2100-lora.safetensors"
    for a, b, expected, common in (
        (first, "sd1_kohya-doubled-prefix_timohavdk_new.safetensors", 1.0, 128),
        (first, "sd1_diffusers_timohavdk_earlier-step.safetensors", 0.963118, 128),
        (
            "sd1_cloneofsimo_analog_svd_rank4.safetensors",
            "sd1_cloneofsimo_analog_svd_distill.text_encoder.pt",
            1.0,
            48,
        ),
    ):
        found, names = cosine(a, b)
        assert found == pytest.approx(expected, abs=1e-6)
        assert names == common


def test_positional_lists_put_zero_where_it_was_seen(shared: Path) -> None:
    """The SD2 list's 32 zero matrices are those of to_out, which its note says."""
    adapter = open_adapter(shared / "loras/real/sd2_cloneofsimo_lora_kiriko_unet.pt", True)
    zero = {name for name, delta in adapter.modules.items() if delta.is_zero}
    assert zero == {name for name in adapter.modules if name.endswith("to_out.0")}
    assert adapter.plan.spelling == "cloneofsimo"


def test_broken_files(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shared / "loras/malformed"
    for name, entry in json.loads((folder / "EXPECTED.json").read_text()).items():
        for allow_pickle in (False, True):
            reading = read(folder / name, allow_pickle)
            assert reading.outcome == entry["outcome"], name
            assert bool(reading.reason) == (reading.outcome != "lora"), name
    assert not list(tmp_path.iterdir()), "a pickle was executed"
    half = read(folder / "half_pair.safetensors").plan
    assert half is not None
    assert len(half.modules) == 1 and len(half.unknown_keys) == 2
    assert any("other half" in note for note in half.notes)


def test_fontbench_is_one_architecture_in_two_spellings(shared: Path) -> None:
    names = defaultdict(set)
    architectures = set()
    for path in sorted((shared / "loras/fontbench").glob("*/*.safetensors"))[::3]:
        plan = open_adapter(path).plan
        architectures.add(plan.architecture)
        names[plan.spelling, len(plan.modules)].add(tuple(sorted(m.name for m in plan.modules)))
        assert not plan.unknown_keys
    assert len(architectures) == 1 and architectures.pop().startswith("other:")
    assert set(names) == {(s, n) for s in ("kohya", "diffusers") for n in (56, 70)}
    assert names["kohya", 70] == names["diffusers", 70] and len(names["kohya", 70]) == 1
    assert names["kohya", 56] == names["diffusers", 56] and len(names["kohya", 56]) == 1
    (full,) = names["kohya", 70]
    assert full[0].startswith("unet/")


def test_published_key_lists_are_accounted_for(shared: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for source in sorted((shared / "loras/keys").glob("*.json")):
        keys = json.loads(source.read_text())["keys"]
        if any(shape is None for shape in keys.values()):
            continue
        # The widths are cut so that the tests write megabytes, not gigabytes.
        small = {
            key: torch.randn([min(n, 8) for n in shape], generator=g).half()
            for key, shape in keys.items()
        }
        path = tmp_path / f"{source.stem}.safetensors"
        save_file(small, path)
        reading = read(path)
        assert reading.outcome == "lora", (source.name, reading.reason)
        assert reading.plan is not None and reading.adapter is not None
        assert set(reading.plan.keys) == set(keys)
        assert reading.plan.unknown_keys == [], source.name
        assert all(delta.is_finite() for delta in reading.adapter.modules.values())
