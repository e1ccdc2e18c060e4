"""``trace`` from files through the index to the rows of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafind.api import Index
from lorafind.trace.descent import dot, tree
from tests.relations.made import trained
from tests.trace.made import Modules, concatenated, factor_summed, low, resized

BLOCKS = ("down_blocks_0", "down_blocks_1", "up_blocks_2", "up_blocks_3")
#: Stored name → shape; widths are not those of the real model.
SHAPES = {
    f"lora_unet_{block}_attentions_0_transformer_blocks_0_{module}": shape
    for block in BLOCKS
    for module, shape in (
        ("attn1_to_q", (320, 320)),
        ("attn1_to_v", (320, 320)),
        ("attn2_to_k", (320, 768)),
        ("ff_net_2", (320, 1280)),
    )
}


def write(path: Path, modules: Modules) -> None:
    tensors = {}
    for name, delta in modules.items():
        d = low(delta)
        tensors[f"{name}.lora_up.weight"] = d.up.contiguous()
        tensors[f"{name}.lora_down.weight"] = d.down.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(d.scale * d.down.shape[0])
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def loras() -> list[Modules]:
    return [trained(SHAPES, 4, seed=k, alpha=2.0) for k in range(12)]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, loras: list[Modules]) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    half = torch.float16
    for k, modules in enumerate(loras):
        write(folder / "l" / f"p{k:02}.safetensors", modules)
    write(folder / "l" / "merge.safetensors", concatenated(loras[:2], [0.7, 0.4], half))
    first = concatenated(loras[:2], [0.7, 0.4], half)
    write(folder / "l" / "second.safetensors", resized([first, loras[2]], [0.5, 1.0], 6, half))
    with Index.open(folder / "x.db", write=True) as index:
        index.build([folder / "l"], device="cpu")
    return folder


def names(paths: Sequence[str]) -> list[str]:
    return [Path(path).stem for path in paths]


def test_eight_parents_down_to_a_tenth(collection: Path, loras: list[Modules]) -> None:
    weights = [0.1, 0.25, 0.4, 0.5, 0.65, 0.8, 0.9, 1.0]
    write(collection / "m.safetensors", concatenated(loras[:8], weights, torch.bfloat16))
    with Index.open(collection / "x.db") as index:
        found = index.trace(str(collection / "m.safetensors"))
    # merge.safetensors holds two of them in another ratio.
    told = {Path(p.path).stem: p.weight for p in found.parents}
    assert found.complete and found.limit is not None and found.limit < 0.05
    assert told == {f"p{k:02}": pytest.approx(w, rel=0.02) for k, w in enumerate(weights)}
    assert sum(p.explained or 0 for p in found.parents) == pytest.approx(1.0, abs=0.02)


def test_a_missing_parent_is_said(collection: Path, loras: list[Modules]) -> None:
    alien = trained(SHAPES, 8, seed=99)
    target = collection / "missing.safetensors"
    write(target, concatenated([loras[3], alien, loras[4]], [0.6, 0.5, 0.3], torch.float16))
    with Index.open(collection / "x.db") as index:
        found = index.trace(str(target))
    assert {Path(p.path).stem: p.weight for p in found.parents} == {
        "p03": pytest.approx(0.6, rel=0.02),
        "p04": pytest.approx(0.3, rel=0.02),
    }
    assert {p.kind for p in found.parents} == {"part"}
    assert not found.complete and found.left is not None and found.left > 0.1
    assert found.limit is not None and 0 < found.limit < 1


def test_a_factor_sum(collection: Path, loras: list[Modules]) -> None:
    target = collection / "factors.safetensors"
    write(target, factor_summed(loras[5:8], [0.6, 0.5, 0.3], torch.float16))
    with Index.open(collection / "x.db") as index:
        found = index.trace(str(target))
    assert {Path(p.path).stem: p.weight for p in found.parents} == {
        f"p{k:02}": pytest.approx(r, rel=0.02) for k, r in ((5, 0.6), (6, 0.5), (7, 0.3))
    }
    assert {p.kind for p in found.parents} == {"factor sum"}
    assert found.complete and found.explained is None


def test_all_gives_the_descent_of_the_collection(collection: Path) -> None:
    with Index.open(collection / "x.db") as index:
        found = {Path(t.path).stem: t for t in index.trace_all()}
    parents = {name: sorted(names([p.path for p in t.parents])) for name, t in found.items()}
    assert {name: p for name, p in parents.items() if p} == {
        "merge": ["p00", "p01"],
        "second": ["merge", "p02"],
    }
    lines = [(Path(line.path).stem, line.depth, line.again) for line in tree(found.values())]
    assert lines == [
        ("p00", 0, False),
        ("merge", 1, False),
        ("second", 2, False),
        ("p01", 0, False),
        ("merge", 1, True),
        ("p02", 0, False),
        ("second", 1, False),
    ]
    graph = list(dot(found.values()))
    assert graph[0] == "digraph descent {" and graph[-1] == "}"
    assert sum("->" in line for line in graph) == 4


def run(collection: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafind", "--db", str(collection / "x.db"), "trace"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_the_rows(collection: Path) -> None:
    done = run(collection, "merge.safetensors", "--header")
    assert done.returncode == 0
    header, first, second = (line.split("\t") for line in done.stdout.splitlines())
    assert header == ["path", "parent", "weight", "sd", "explained", "kind", "text"]
    assert names([first[0], first[1], second[1]]) == ["merge", "p00", "p01"]
    assert float(first[2]) == pytest.approx(0.7, rel=0.002)
    assert "explained" in done.stderr
    paths = run(collection, "merge", "-0").stdout.split("\0")
    assert names([p for p in paths if p]) == ["p00", "p01"]


def test_an_estimate_is_called_one(collection: Path, loras: list[Modules]) -> None:
    """A resize has cut a merge of which one parent is missing: nothing can be proved."""
    alien = trained(SHAPES, 8, seed=99)
    merged = concatenated([loras[3], alien], [0.9, 0.4], torch.float16)
    write(collection / "cut.safetensors", resized([merged], [1.0], 6, torch.float16))
    done = run(collection, str(collection / "cut.safetensors"), "--exit-code")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cut.safetensors: no parent found." in done.stderr
    assert "Not proved, an estimate: " in done.stderr
    assert "p03.safetensors would explain" in done.stderr
    (told,) = json.loads(run(collection, str(collection / "cut.safetensors"), "--json").stdout)
    assert told["parents"] == [] and not told["complete"]
    (likely,) = told["likely"]
    assert names([likely["path"]]) == ["p03"]
    assert likely["weight"] == pytest.approx(0.9, rel=0.15) and likely["explained"] > 0.3


def test_no_parent_found(collection: Path) -> None:
    done = run(collection, "p05", "--exit-code")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no parent found" in done.stderr
    (told,) = json.loads(run(collection, "p05", "--json").stdout)
    assert told["parents"] == [] and told["explained"] == 0.0


def test_wrong_use(collection: Path) -> None:
    for arguments in ((), ("--all", "p05"), ("--dot", "p05"), ("--all", "--dot", "--json")):
        assert run(collection, *arguments).returncode == 2
    missing = run(collection, "nothing.safetensors")
    assert missing.returncode == 4 and "neither a file nor a name" in missing.stderr
