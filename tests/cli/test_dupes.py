"""``dupes`` where another process holds the index, and its rows off a terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorafind.api import Index
from lorafind.cli import dupes as command
from lorafind.index import relate
from tests.search import small

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


def test_what_was_not_looked_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = small.random(1)
    save = small.save
    save(tmp_path / "l/a.safetensors", one)
    save(tmp_path / "l/b.safetensors", small.each(one, lambda a: a.astype(np.float16)))
    save(tmp_path / "l/c.safetensors", small.resized(one, 2))
    db = tmp_path / "x.db"
    monkeypatch.setattr(relate, "PATIENCE", -1.0)
    small.index(db, tmp_path / "l")
    done = small.run(db, "dupes", "--json")
    (group,) = json.loads(done.stdout)
    assert [member["grade"] for member in group["files"]] == ["keeper", "weights"]
    assert "0 of 3 LoRAs are compared in full; of the others only file, tensors, weights" in (
        " ".join(done.stderr.split())
    )
    assert "`lorafind dupes --deep`" in done.stderr
    # For these grades nothing is missing.
    assert "in full" not in small.run(db, "dupes", "--grade", "weights").stderr

    monkeypatch.setattr(relate, "seconds_of", lambda *_: 3 * 3600.0)
    deep = small.run(db, "dupes", "--deep", "--json")
    assert "Comparing 3 LoRAs with all of 3 takes about 3 h 0 min (an estimate" in (
        " ".join(deep.stderr.split())
    )
    (group,) = json.loads(deep.stdout)
    assert {member["grade"] for member in group["files"]} == {"keeper", "weights", "resized"}
    again = small.run(db, "dupes", "--deep", "--json")
    assert json.loads(again.stdout) == [group]
    assert "takes about" not in again.stderr
    assert "in full" not in again.stderr


@pytest.mark.parametrize(("answer", "grades"), [("n\n", 2), ("y\n", 3)])
def test_a_long_comparison_asks_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, grades: int
) -> None:
    one = small.random(1)
    small.save(tmp_path / "l/a.safetensors", one)
    small.save(tmp_path / "l/b.safetensors", small.each(one, lambda a: a.astype(np.float16)))
    small.save(tmp_path / "l/c.safetensors", small.resized(one, 2))
    db = tmp_path / "x.db"
    monkeypatch.setattr(relate, "PATIENCE", -1.0)
    monkeypatch.setattr(relate, "seconds_of", lambda *_: 3 * 3600.0)
    small.index(db, tmp_path / "l")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_terminal", lambda: True)
        done = small.run(db, "dupes", "--deep", "--jsonl", input=answer)
    assert "Begin?" in done.stderr
    (group,) = [json.loads(line) for line in done.stdout.splitlines() if line[0] == "{"]
    assert len(group["files"]) == grades
