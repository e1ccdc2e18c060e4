"""``lorafind similar`` with pictures as targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from tests.terminal import read_to_end
from tests.train.conftest import apart, rings, stripes, tiny_folder

__all__ = ["apart", "rings", "stripes", "tiny_folder"]

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(make_app(), [*map(str, arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def lora(rings: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index with one LoRA of the tiny model in it."""
    folder: Path = tmp_path_factory.mktemp("index")
    path = folder / "rings.safetensors"
    quick = ("--model", tiny_folder, "--resolution", "64", "--steps", "2", "--prior-weight", "0")
    call("train", rings, "-o", path, "--seed", "9", *quick, "--db", folder / "index.db")
    call("index", path, "--db", folder / "index.db")
    return path


@pytest.fixture
def options(
    lora: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    monkeypatch.setenv("LORAFIND_DB", str(lora.parent / "index.db"))
    monkeypatch.setenv("LORAFIND_CACHE", str(tmp_path / "cache"))
    return (
        *("--model", str(tiny_folder), "--resolution", "64"),
        *("--steps", "2", "--prior-weight", "0"),
    )


def test_a_folder_of_pictures(
    stripes: Path, lora: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    call("similar", stripes, *options, code=2)
    first = call("similar", stripes, *options, "--yes", "--json")
    (found,) = json.loads(first.stdout)
    assert (found["query"], found["path"]) == (str(stripes), str(lora))
    assert "Pictures: 6; captions: 6 from files." in first.stderr
    (query,) = (tmp_path / "cache" / "train" / "queries").glob("*.safetensors")
    # From then on nothing has to be agreed to; other settings are another LoRA.
    again = call("similar", stripes, lora, *options, "--json")
    assert json.loads(again.stdout) == [found]
    assert f"is in the cache: {query}" in again.stderr and "Training" not in again.stderr
    said = call("similar", stripes, *options, "--steps", "3", code=2).stderr
    assert "agree to it with --yes" in said.replace("\n", " ")


def test_several_pictures_are_one_target(
    rings: Path, lora: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    some = [rings / "rings-0.png", rings / "rings-1.png"]
    found = json.loads(call("similar", *some, *options, "--yes", "--json").stdout)
    assert [row["query"] for row in found] == [str(some[0])]
    assert len(list((tmp_path / "cache" / "train" / "queries").iterdir())) == 1


def test_what_is_wrong_with_pictures(
    rings: Path, lora: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.png").write_bytes((rings / "rings-0.png").read_bytes())
    said = call("similar", bare, *options, "--yes", code=3).stderr
    assert "None of the 1 pictures has a caption" in said
    said = call("similar", bare, *options, "--yes", "--caption", "gpt", code=2).stderr
    assert "--caption is one of" in said.replace("\n", " ")
    said = call("similar", bare, *options, "--steps", "0", "--caption", "none", code=2).stderr
    assert "must be at least 1" in said.replace("\n", " ")
    # A folder without pictures is what it was before.
    (tmp_path / "empty").mkdir()
    assert "is a folder" in call("similar", tmp_path / "empty", code=3).stderr


@pytest.mark.skipif(os.name != "posix", reason="a POSIX terminal")
def test_asked_on_a_terminal(
    rings: Path, stripes: Path, lora: Path, options: tuple[str, ...], tmp_path: Path
) -> None:
    """No to the first folder, yes to the second."""
    import pty

    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "lorafind", "similar", str(rings), str(stripes), *options]
    child = subprocess.Popen(
        [*words, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TERM": "dumb"},
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
    )
    os.close(theirs)
    # The terminal keeps the second answer until it is asked for.
    os.write(ours, b"n\ny\n")
    received = read_to_end(ours)
    assert child.stdout is not None
    found = json.loads(child.stdout.read())
    shown = " ".join(received.split())
    assert child.wait() == 0, shown
    for folder in (rings, stripes):
        assert f"Train a LoRA of {folder}, in about" in shown
    assert [row["query"] for row in found] == [str(stripes)]
