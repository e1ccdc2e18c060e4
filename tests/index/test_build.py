"""``build`` where the pieces meet: configurations, forgetting, one reading per content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafind.api import Index

NAME = "base_model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def peft(folder: Path, alpha: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for k in range(8):
        tensors[NAME.format(k, "A")] = torch.randn(4, 48, generator=g)
        tensors[NAME.format(k, "B")] = torch.randn(48, 4, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    configure(folder, alpha)
    old = 1_600_000_000
    os.utime(folder / "adapter_model.safetensors", (old, old))
    return folder / "adapter_model.safetensors"


def configure(folder: Path, alpha: float) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))


def norms(index: Index) -> list[float]:
    return [n for (n,) in index.store.conn.execute("SELECT norm FROM loras ORDER BY id")]


def test_equal_bytes_with_another_alpha_are_scaled_not_the_same_file(tmp_path: Path) -> None:
    peft(tmp_path / "a", 4)
    peft(tmp_path / "b", 8)
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([tmp_path])
        one, two = norms(index)
        assert two / one == pytest.approx(2.0) or one / two == pytest.approx(2.0)
        (group,) = index.dupes()
    assert group.grade == "scaled"
    assert not any(member.removable for member in group.files)


def test_a_changed_configuration_is_noticed(tmp_path: Path) -> None:
    file = peft(tmp_path / "a", 4)
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([tmp_path / "a"])
        (before,) = norms(index)
        assert index.build().refreshed == 0
        configure(tmp_path / "a", 12)
        later = file.stat().st_mtime + 2_000_000_000
        os.utime(tmp_path / "a" / "adapter_config.json", (later, later))
        assert index.build().refreshed == 1
        (after,) = norms(index)
    assert after == pytest.approx(3 * before)


def test_forget(tmp_path: Path) -> None:
    peft(tmp_path / "a", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([tmp_path / "a", tmp_path / "b"])
        assert not index.forget(tmp_path / "c")
        assert index.forget(tmp_path / "a")
        assert [r["path"] for r in index.ls()] == [str(tmp_path / "b/adapter_model.safetensors")]
        assert index.forget(tmp_path / "b")
        assert norms(index) == []
    assert (tmp_path / "a/adapter_model.safetensors").exists()
