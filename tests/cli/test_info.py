"""``lorafind info``: what it prints, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lorafind.cli.app import make_app
from tests.search.made_files import LAYERS, make, write
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """One LoRA of seven modules."""
    metadata = {"sshs_model_hash": "a" * 64, "ss_training_finished_at": "1700000000.5"}
    return write(tmp_path / "a.safetensors", make("lora", 1)[0], metadata)


def call(folder: Path, *arguments: str | Path, input: str | None = None) -> Result:
    runner = CliRunner(env={"LORAFIND_DB": str(folder / "index.db")})
    return runner.invoke(make_app(), ["info", *map(str, arguments)], input=input)


def test_json_holds_every_documented_field(tmp_path: Path, lora: Path) -> None:
    result = call(tmp_path, lora, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    (row,) = json.loads(result.stdout)
    assert set(row) == {
        *("path", "outcome", "reason", "read", "size", "name", "architecture", "family"),
        *("spelling", "rank", "ranks", "alpha", "alphas", "scale", "modules", "zero_modules"),
        *("per_module", "norm", "groups", "components", "dtype", "effective_dtype", "facts"),
        *("config", "hints", "sidecar", "embeddings", "extras", "hashes", "recorded"),
        *("unknown_keys", "notes", "candidates", "parameters", "magnitudes", "unread_keys"),
        "key_counts",
    }
    assert row["path"] == str(lora)
    assert row["hashes"]["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()


def test_tsv_is_one_line_per_file(tmp_path: Path, lora: Path) -> None:
    result = call(tmp_path, lora, lora, "--header")
    header, *lines = result.stdout.splitlines()
    assert len(lines) == 2
    row = dict(zip(header.split("\t"), lines[0].split("\t"), strict=True))
    assert row["path"] == str(lora)
    assert (row["outcome"], row["architecture"], row["ranks"]) == ("lora", "sd1", '{"3": 7}')
    assert row["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()


def test_files_that_cannot_be_read_are_named_and_told_by_the_exit_code(
    tmp_path: Path, lora: Path
) -> None:
    pointer = tmp_path / "p.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    result = call(tmp_path, pointer, lora, tmp_path / "none.safetensors", "--jsonl")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["outcome"] for row in rows] == ["lfs-pointer", "lora", "vanished"]
    assert all(row["reason"] for row in rows if row["outcome"] != "lora")
    assert result.exit_code == 3
    embedding = write(tmp_path / "e.safetensors", {"emb_params": torch.ones(2, 768)})
    result = call(tmp_path, embedding, "--jsonl")
    assert json.loads(result.stdout)["outcome"] == "embedding"
    assert result.exit_code == 0


def test_pickles_need_a_word(tmp_path: Path) -> None:
    torch.save(make("lora", 1)[0], tmp_path / "a.pt")
    result = call(tmp_path, tmp_path / "a.pt", "--jsonl")
    assert (json.loads(result.stdout)["outcome"], result.exit_code) == ("pickle", 3)
    result = call(tmp_path, tmp_path / "a.pt", "--jsonl", "--allow-pickle")
    row = json.loads(result.stdout)
    assert (row["outcome"], row["modules"], result.exit_code) == ("lora", 7, 0)
    assert row["hashes"]["autov3"] is None
    result = call(tmp_path, tmp_path / "a.pt", "--jsonl", "--allow-pickle", "--header-only")
    assert "has no header" in json.loads(result.stdout)["reason"]


def test_keys_and_modules(tmp_path: Path, lora: Path) -> None:
    name, (key, group, _, shape) = next(iter(LAYERS.items()))
    lines = [line.split("\t") for line in call(tmp_path, lora, "--keys").stdout.splitlines()]
    assert len(lines) == 3 * len(LAYERS)
    up = [str(lora), f"{key}.lora_up.weight", f"module:{name}", "F32", f"[{shape[0]}, 3]"]
    assert up in lines
    lines = [line.split("\t") for line in call(tmp_path, lora, "--modules").stdout.splitlines()]
    assert len(lines) == len(LAYERS)
    line = next(line for line in lines if line[1] == name)
    assert line[2:7] == [group, "lora", str(list(shape)), "3", "2.000000"]
    assert call(tmp_path, lora, "--keys", "--modules").exit_code == 2
    (row,) = json.loads(call(tmp_path, lora, "--keys", "--modules", "--json").stdout)
    assert len(row["keys"]) == len(row["tensors"]) == 3 * len(row["per_module"])


def test_targets_from_stdin(tmp_path: Path, lora: Path) -> None:
    result = call(tmp_path, "-", input=f"{lora}\trest\n")
    assert result.stdout.startswith(f"{lora}\tlora\t")


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_for_people(tmp_path: Path, lora: Path) -> None:
    command = [sys.executable, "-m", "lorafind", "info", str(lora)]
    environment = {"NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    code, shown = run_on_terminal(command, tmp_path, environment, columns=200)
    lines = {line[:14].strip(): line[14:].strip() for line in shown.splitlines()}
    assert code == 0
    assert lines["Is"] == "lora"
    assert lines["Family"] == "locon, in kohya names"
    assert lines["Alpha"] == "2 (scale 0.666667)"
    assert lines["Trained"] == "2023-11-14 22:13 UTC"
    assert lines["Recorded"] == f"sshs_model_hash {'a' * 64} (stale)"
    assert lines["AutoV2"] == hashlib.sha256(lora.read_bytes()).hexdigest()[:10]
    assert lines["Notes"] == "the recorded sshs_model_hash is not that of these bytes"


def test_the_header_alone_does_not_import_torch(tmp_path: Path, lora: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'lorafind'\n"
        "from lorafind.cli.app import run\n"
        "try: run()\n"
        "finally: print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "--header-only", "--jsonl", str(lora)],
        cwd=ROOT,
        env={**os.environ, "LORAFIND_DB": str(tmp_path / "index.db")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "False False\n")
    assert json.loads(done.stdout)["architecture"] == "sd1"
