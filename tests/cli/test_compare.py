"""``lorafind compare``: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from tests.search.made_files import make, write
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA, and the U-Net part of it in F16."""
    tensors, _ = make("lora", 1)
    a = write(tmp_path / "a.safetensors", tensors)
    part = {k: t.half() for k, t in tensors.items() if "_te_" not in k}
    return a, write(tmp_path / "b.safetensors", part)


def call(folder: Path, *arguments: str | Path) -> Result:
    runner = CliRunner(env={"LORAFIND_DB": str(folder / "index.db")})
    return runner.invoke(make_app(), ["compare", *map(str, arguments)])


def test_json(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    result = call(tmp_path, *pair, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    row = json.loads(result.stdout)
    assert set(row) == {
        *("a", "b", "comparable", "relation", "common", "cosine", "cosine_all", "ratio"),
        *("components", "groups", "blocks", "style", "same_session", "same_base", "words"),
    }
    assert (row["a"]["path"], row["b"]["path"]) == tuple(map(str, pair))
    assert row["relation"]["grade"] == "part"
    assert row["relation"]["larger"] == "x"


def test_tsv_is_one_line_per_part(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    header, *lines = call(tmp_path, *pair, "--header").stdout.splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]
    assert [(row["kind"], row["name"]) for row in rows] == [
        ("all", ""),
        ("component", "unet"),
        ("component", "te1"),
        ("group", "self_attn"),
        ("group", "cross_attn"),
        ("group", "ff"),
        ("group", "conv"),
        ("group", "text"),
        ("block", "unet/down_blocks.0"),
        ("block", "unet/up_blocks.3"),
        ("block", "te1/text_model.encoder.layers.3"),
    ]
    assert [row["only_a"] for row in rows[:3]] == ["1", "0", "1"]
    assert float(rows[0]["cosine"]) == pytest.approx(1, abs=1e-6)
    assert float(rows[0]["cosine_all"]) < 0.999
    assert (rows[2]["cosine"], rows[2]["ratio"]) == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_for_people(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    command = [sys.executable, "-m", "lorafind", "compare", *map(str, pair)]
    environment = {"NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    code, shown = run_on_terminal(command, tmp_path, environment, columns=200)
    first, *rest = shown.splitlines()
    assert code == 0
    assert first.split(maxsplit=1) == [
        "Relation",
        "one is a part of the other: B is A, stored as F16, text encoder dropped".ljust(
            len(first.split(maxsplit=1)[1])
        ),
    ]
    assert any(line.split()[:3] == ["group", "self_attn", "2"] for line in rest)


def test_what_cannot_be_compared(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    result = call(tmp_path, pair[0], bad)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "bad.safetensors" in result.stderr
    assert "Traceback" not in result.stderr
    assert call(tmp_path, pair[0]).exit_code == 2
