"""A small collection with known duplicates, indexed, and what stands in it as plain facts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorafind.api import Index
from lorafind.clean.apply import How, Outcome
from lorafind.clean.undo import Back
from lorafind.search.dupes import Choice

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{}_to_q.lora_{}.weight"
OLD_NS = 1_600_000_000_000_000_000


def tensors(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA of two modules."""
    g = torch.Generator().manual_seed(seed)
    return {
        NAME.format(k, side): torch.randn(shape, generator=g)
        for k in (1, 2)
        for side, shape in (("down", (rank, 1280)), ("up", (1280, rank)))
    }


@dataclass
class Shelf:
    """A folder ``loras`` with its index: ``<n>/keep``, its byte copy ``<n>/copy`` and, in F16,
    ``<n>/half``, all ``.safetensors``."""

    top: Path

    @property
    def db(self) -> Path:
        return self.top / "i.db"

    @property
    def loras(self) -> Path:
        return self.top / "loras"

    @property
    def out(self) -> Path:
        return self.top / "out"

    def index(self) -> None:
        with Index.open(self.db, write=True) as index:
            index.build([self.loras], device="cpu")

    def plan(self, **choice: Any) -> Path:
        path = self.top / "plan.json"
        path.unlink(missing_ok=True)
        with Index.open(self.db) as index:
            index.plan(path, Choice(**choice))
        return path

    def edit(self, change: Callable[[dict[str, Any]], None], **choice: Any) -> Path:
        path = self.plan(**choice)
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
        return path

    def apply(
        self, plan: Path, kind: Any = "move", folder: Path | None = None
    ) -> dict[str, Outcome]:
        """Below ``loras`` → outcome."""
        how = How(kind, str(folder or self.out) if kind == "move" else "")
        with Index.open(self.db, write=True) as index:
            return {os.path.relpath(row.path, self.loras): row for row in index.apply(plan, how)}

    def undo(self) -> list[Back]:
        with Index.open(self.db, write=True) as index:
            return [back for log in reversed(index.undo_logs()) for back in index.undo(log)]


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Below the folder: path → (SHA-256 or target of a link, mtime) of all but folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = (f"-> {os.readlink(path)}", 0)
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (digest, path.stat().st_mtime_ns)
    return found


def contents(*folders: Path) -> set[str]:
    """SHA-256 of all regular files below."""
    return {
        digest
        for folder in folders
        if folder.exists()
        for digest, _ in snapshot(folder).values()
        if not digest.startswith("->")
    }


def age(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, ns=(OLD_NS, OLD_NS + len(path.name)))


def fill(loras: Path, groups: int, seed: int = 0, rank: int = 2) -> None:
    for n in range(groups):
        folder = loras / str(n)
        folder.mkdir(parents=True)
        found = tensors(seed + n, rank)
        save_file(found, folder / "keep.safetensors")
        shutil.copyfile(folder / "keep.safetensors", folder / "copy.safetensors")
        save_file({name: t.half() for name, t in found.items()}, folder / "half.safetensors")
        for name in ("copy.json", "copy.preview.png", "half.txt", "keep.txt"):
            (folder / name).write_text(f"{{}} {n} {name}")
        (folder / "copy.json").write_text("{}" + " " * n)
    age(loras)


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a shelf of two groups."""
    top = tmp_path_factory.mktemp("filled")
    fill(top / "loras", 2)
    return top / "loras"


@pytest.fixture
def shelf(filled: Path, tmp_path: Path) -> Iterator[Shelf]:
    """A shelf of two groups, indexed."""
    shutil.copytree(filled, tmp_path / "loras")
    # The oldest stays.
    for n in range(2):
        os.utime(tmp_path / f"loras/{n}/keep.safetensors", ns=(OLD_NS - 10**12,) * 2)
    found = Shelf(tmp_path)
    found.index()
    yield found
