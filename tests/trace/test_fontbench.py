"""Merges of LoRAs that were really trained, on layers as narrow as 32: parents fill their width."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafind.api import Index
from lorafind.formats.read import open_adapter
from tests.trace.made import Modules, concatenated, low, resized


@pytest.fixture(scope="module")
def bench(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """An index of 40 LoRAs of five fonts, in the world of one initialisation and in the wild."""
    files = [
        path
        for world, fonts in (("wild", 3), ("fixed", 2))
        for font in sorted(
            {p.name.partition("-")[0] for p in (shared / "loras/fontbench" / world).glob("*.s*")}
        )[:fonts]
        for path in sorted((shared / "loras/fontbench" / world).glob(f"{font}-train-*"))
    ]
    db = tmp_path_factory.mktemp("bench") / "x.db"
    with Index.open(db, write=True) as index:
        index.build(files, device="cpu")
    return db, files


def modules_of(path: Path) -> Modules:
    adapter = open_adapter(path)
    return {name: adapter.modules[name] for name in adapter.modules}


def write(path: Path, modules: Modules) -> None:
    tensors = {}
    for name, delta in modules.items():
        stem = "lora_unet_" + name.partition("/")[2].replace(".", "_")
        tensors[f"{stem}.lora_up.weight"] = low(delta).up.contiguous()
        tensors[f"{stem}.lora_down.weight"] = low(delta).down.contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(low(delta).down.shape[0]))
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("count", "rank", "dtype"),
    [(2, 0, torch.float16), (8, 0, torch.bfloat16), (3, 8, torch.bfloat16), (8, 16, torch.float16)],
)
def test_planted_merges(
    bench: tuple[Path, list[Path]], tmp_path: Path, count: int, rank: int, dtype: torch.dtype
) -> None:
    db, files = bench
    chooser = random.Random(count + rank)
    chosen = chooser.sample(files, count)
    weights = [round(chooser.uniform(0.1, 1.0), 2) for _ in chosen]
    parents = [modules_of(path) for path in chosen]
    made = resized(parents, weights, rank, dtype) if rank else concatenated(parents, weights, dtype)
    write(tmp_path / "m.safetensors", made)
    with Index.open(db) as index:
        found = index.trace(str(tmp_path / "m.safetensors"))
    assert {p.path: p.weight for p in found.parents} == {
        str(path): pytest.approx(w, rel=0.02) for path, w in zip(chosen, weights, strict=True)
    }
    assert found.complete


def test_trainings_of_one_font_have_no_parents(bench: tuple[Path, list[Path]]) -> None:
    db, files = bench
    with Index.open(db) as index:
        for path in files[::8]:
            assert index.trace(str(path)).parents == []
