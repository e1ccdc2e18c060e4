"""``lorafind mix`` over the demo's collection, and on FontBench."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorafind import Index
from lorafind.demo.make import make
from lorafind.formats.read import open_adapter
from lorafind.index.problem import IndexProblem
from lorafind.mix.mix import Mix, Wishes, text
from lorafind.search.similar import Wishes as Many
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


def test_what_the_file_will_have_once_indexed_is_told(db: Path, tmp_path: Path) -> None:
    """The sum of fitted LoRAs carries their noise; its file is new to the basis."""
    target = db.parent / "demo/wild/lobster-train-07.safetensors"
    db = tmp_path / "whole.db"
    small.index(db, target.parents[1])
    (tmp_path / "l").mkdir()
    whole, low = (tmp_path / "l" / f"{name}.safetensors" for name in ("whole", "low"))
    done = small.run(db, "mix", str(target), "-o", str(whole), "--json")
    told = json.loads(done.stdout)
    assert told["score"] > told["nearest"] and told["score"] - told["fresh"] > 0.005
    done = small.run(db, "mix", str(target), "-o", str(low), "--rank", "2", "--tsv")
    assert "% of ‖ΔW‖² left out by the rank" in done.stderr
    small.index(db, tmp_path / "l")
    with Index.open(db) as index:
        found = {one.path: one.score for one in index.similar(str(target), Many(100, every=True))}
    assert told["file"]["score"] == pytest.approx(found[str(whole)], abs=2e-4)
    assert told["fresh"] == pytest.approx(told["file"]["score"], abs=1e-3)
    assert f"in `similar` its score is {found[str(low)]:.3f}" in done.stderr


def test_a_text_encoder_alone_is_said_to_be_left_out(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    text_encoder = {
        f"lora_te_text_model_encoder_layers_{k}_self_attn_q_proj": (
            g.standard_normal((768, 4)).astype("f4"),
            g.standard_normal((4, 768)).astype("f4"),
        )
        for k in range(4)
    }
    for k in range(32):
        small.save(tmp_path / f"l/{k}.safetensors", small.random(k))
    small.save(tmp_path / "l/text.safetensors", text_encoder)
    small.index(tmp_path / "i.db", tmp_path / "l", relate=False)
    with Index.open(tmp_path / "i.db", write=True) as index:
        index.finish()
    stranger = small.save(tmp_path / "x.safetensors", small.random(99))
    found = mixed(tmp_path / "i.db", stranger)
    assert found.apart == 1
    done = small.run(tmp_path / "i.db", "mix", str(stranger))
    assert "(a text encoder alone, for instance): 1." in done.stderr


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
    # As A1111 takes a prompt apart (extra_networks.py), and its number is one for Python.
    tags = re.findall(r"<(\w+):([^>]+)>", found.a1111)
    assert [(kind, *tag.split(":")) for kind, tag in tags] == [
        ("lora", one.name, text(one.weight)) for one in found.ingredients
    ]
    assert found.unsaid == []
    odd = replace(found, ingredients=(replace(found.ingredients[0], path="/l/a:b.safetensors"),))
    assert odd.unsaid == ["a:b"]
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
