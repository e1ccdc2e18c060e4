"""``lorafind mix`` over the demo's collection, and on FontBench."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lorafind import Index
from lorafind.demo.make import make
from lorafind.formats.read import open_adapter
from lorafind.index.problem import IndexProblem
from lorafind.mix.mix import Mix, Wishes, text
from tests.search import small


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    make(folder / "demo")
    small.index(folder / "i.db", folder / "demo/thin")
    return folder / "i.db"


def mixed(db: Path, target: Path | str, wishes: Wishes | None = None) -> Mix:
    with Index.open(db) as index:
        return index.mix(str(target), wishes)


def stranger(db: Path) -> Path:
    """A LoRA of one of the fonts that the index does not hold."""
    return db.parent / "demo/wild/courier-prime-train-02.safetensors"


def test_signed_weights(db: Path) -> None:
    found = mixed(db, stranger(db), Wishes(signed=True))
    assert min(one.weight for one in found.ingredients) < 0
    assert found.score > found.nearest


def test_a_stranger_is_approached_by_its_own_font(db: Path) -> None:
    found = mixed(db, stranger(db))
    assert found.score > found.nearest
    weights = {one.path: one.weight for one in found.ingredients}
    assert "courier" in found.ingredients[0].path and min(weights.values()) > 0
    courier = sum(w for p, w in weights.items() if "courier" in p)
    assert courier > 0.6 * sum(weights.values())
    assert len(found.ingredients) <= 8
    assert len(mixed(db, stranger(db), Wishes(terms=2)).ingredients) <= 2
    alone = mixed(db, stranger(db), Wishes(terms=1))
    with Index.open(db) as index:
        first = next(index.similar(str(stranger(db))))
    # One LoRA is measured from its file as the index has it.
    assert alone.ingredients[0].path == first.path
    # `similar` gives four decimals.
    assert alone.nearest == pytest.approx(first.score, abs=1e-4)
    assert alone.score == pytest.approx(first.score, abs=1e-3)


def test_the_target_and_its_kin_are_left_out(db: Path, tmp_path: Path) -> None:
    target = db.parent / "demo/thin/lobster-train-01.safetensors"
    found = mixed(db, target)
    assert str(target) not in {one.path for one in found.ingredients}
    shutil.copytree(db.parent / "demo", tmp_path / "demo")
    small.index(tmp_path / "i.db", tmp_path / "demo")
    target = tmp_path / "demo/wild/lobster-train-02.safetensors"
    names = {one.name for one in mixed(tmp_path / "i.db", target).ingredients}
    assert names and names.isdisjoint({"lobster-kohya", "lobster-rank2"})


def test_the_score_is_that_of_the_file(db: Path, tmp_path: Path) -> None:
    """``norm`` and the ΔW of the file are those of the stated sum."""
    out = tmp_path / "mix.safetensors"
    done = small.run(db, "mix", str(stranger(db)), "-o", str(out), "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["file"]["path"] == str(out)
    adapter, square = open_adapter(out), 0.0
    parents = [(one["weight"], open_adapter(one["path"])) for one in told["ingredients"]]
    for name, delta in adapter.modules.items():
        wanted = sum(w * p.modules[name].dense() for w, p in parents if name in p.modules)
        assert float((delta.dense() - wanted).norm()) <= 1e-6 * float(wanted.norm())
        square += float(wanted.square().sum())
    assert told["norm"] == pytest.approx(square**0.5, rel=1e-5)


def test_lines_and_notations(db: Path) -> None:
    found = mixed(db, stranger(db))
    done = small.run(db, "mix", str(stranger(db)), "--header")
    header, *lines = done.stdout.splitlines()
    assert header.split("\t") == ["path", "weight", "score", "mix_score"]
    assert [line.split("\t")[:2] for line in lines] == [
        [one.path, f"{one.weight:.4f}"] for one in found.ingredients
    ]
    prompt = " ".join(f"<lora:{o.name}:{text(o.weight)}>" for o in found.ingredients)
    assert f"A1111: {prompt}\n" in done.stderr
    assert found.comfyui[0] == {
        "lora_name": os.path.basename(found.ingredients[0].path),
        "strength_model": found.ingredients[0].weight,
        "strength_clip": found.ingredients[0].weight,
    }
    # The printed weight is the one that was measured.
    assert all(float(text(one.weight)) == one.weight for one in found.ingredients)


@pytest.mark.parametrize(("weight", "said"), [(0.5, "0.5"), (-1.25, "-1.25"), (0.0001, "0.0001")])
def test_weights_in_decimals(weight: float, said: str) -> None:
    assert text(weight) == said


def test_wrong_use(db: Path, tmp_path: Path) -> None:
    target = str(stranger(db))
    for options in (["--rank", "4"], ["--force"], ["--dtype", "F8"]):
        assert small.run(db, "mix", target, *options).exit_code == 2
    out = tmp_path / "there.safetensors"
    out.write_text("mine")
    done = small.run(db, "mix", target, "-o", str(out))
    assert done.exit_code == 4 and "is there already" in done.stderr
    assert out.read_text() == "mine"
    one = small.save(tmp_path / "l/one.safetensors", small.random(1))
    small.index(tmp_path / "few.db", tmp_path / "l")
    with pytest.raises(IndexProblem, match="no basis for sd1 to mix in"):
        mixed(tmp_path / "few.db", one)


def test_a_file_changed_since_is_not_mixed(db: Path, tmp_path: Path) -> None:
    shutil.copytree(db.parent / "demo", tmp_path / "demo")
    small.index(tmp_path / "i.db", tmp_path / "demo/thin")
    best = mixed(tmp_path / "i.db", tmp_path / stranger(db).relative_to(db.parent))
    os.utime(best.ingredients[0].path, (1, 1))
    with pytest.raises(IndexProblem, match="was changed since it was indexed"):
        mixed(tmp_path / "i.db", tmp_path / stranger(db).relative_to(db.parent))


def test_fontbench(shared: Path, tmp_path: Path) -> None:
    """Targets that the index lacks are approached nearer than by their nearest neighbour."""
    folder = shared / "loras/fontbench/wild"
    with (folder / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (tmp_path / "train").mkdir()
    for row in rows:
        if row["split"] == "train":
            (tmp_path / "train" / row["file"]).symlink_to(folder / row["file"])
    small.index(tmp_path / "i.db", tmp_path / "train", relate=False)
    with Index.open(tmp_path / "i.db", write=True) as index:
        index.finish()
    targets = sorted(row["file"] for row in rows if row["split"] == "test_diff")[::8]
    gains = []
    for name in targets:
        found = mixed(tmp_path / "i.db", folder / name)
        gains.append(found.score - found.nearest)
    assert len(gains) == 5
    # Never farther: the single LoRA is one of the mixes that are measured.
    assert min(gains) > -1e-3
    assert np.mean(np.array(gains) > 0.001) >= 0.75 and np.mean(gains) > 0.03
