"""``dupes`` where another process holds the index, and its rows off a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorafind.api import Index

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{}_to_q.lora_{}.weight"


def collection(folder: Path) -> None:
    folder.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {
        NAME.format(k, side): torch.randn(shape, generator=g)
        for k in (1, 2)
        for side, shape in (("down", (4, 1280)), ("up", (1280, 4)))
    }
    save_file(tensors, folder / "a.safetensors")
    save_file({k: t.half() for k, t in tensors.items()}, folder / "b.safetensors")


def run(db: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafind", "--db", str(db), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_relations_are_proved_by_the_first_dupes(tmp_path: Path) -> None:
    collection(tmp_path / "l")
    assert run(tmp_path / "x.db", "index", str(tmp_path / "l"), "--no-relations").returncode == 0
    (group,) = json.loads(run(tmp_path / "x.db", "dupes", "--json").stdout)
    assert group["grade"] == "weights"
    assert group["keeper"].endswith("a.safetensors")
    keeper, copy = group["files"]
    assert (copy["grade"], copy["removable"], copy["factor"]) == ("weights", True, 1.0)
    assert group["freed_bytes"] == copy["bytes"] > 0
    assert copy["differs"]["dtype"] == ["F32", "F16"]
    assert not keeper["removable"]


def test_a_running_writer_is_no_obstacle(tmp_path: Path) -> None:
    collection(tmp_path / "l")
    with Index.open(tmp_path / "x.db", write=True) as index:
        index.build([tmp_path / "l"], relate=False)
        done = run(tmp_path / "x.db", "dupes", "--json", "--exit-code")
        assert (done.returncode, json.loads(done.stdout)) == (1, [])
        assert "not proved yet" in done.stderr
        assert "Traceback" not in done.stderr
