"""The collections of trained LoRAs: what is alike in style is found, and nothing is called a copy.

Queries are the test files, which the index does not hold; mean average precision is over the whole
ranking. The figures to reach are those of the exact features and of the stored signatures in the
README of the collections, less the noise of one collection.
"""

from __future__ import annotations

import csv
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lorafind.index.store import Store
from lorafind.search.query import ask
from lorafind.search.similar import Wishes, similar
from tests.e2e import variants as v
from tests.e2e.tools import index, names, relations

EVERY = Wishes(count=10**6, every=True)


@dataclass(frozen=True)
class World:
    """An index of the ``train`` files of one collection, and its labels by file name."""

    folder: Path
    db: Path
    plain: Path
    labels: dict[str, dict[str, str]]

    def split(self, name: str) -> list[str]:
        """The files of one split."""
        return sorted(file for file, label in self.labels.items() if label["split"] == name)


@pytest.fixture(scope="module", params=["wild", "fixed", "thin"])
def world(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    folder = shared / "loras/fontbench" / request.param
    with (folder / "labels.csv").open(newline="") as file:
        labels = {row["file"]: row for row in csv.DictReader(file)}
    made = tmp_path_factory.mktemp(request.param)
    found = World(folder, made / "i.db", made / "plain.db", labels)
    (made / "train").mkdir()
    for file in found.split("train"):
        shutil.copy2(folder / file, made / "train" / file)
    index(found.db, made / "train")
    shutil.copyfile(found.db, found.plain)
    with Store.open(found.plain, "write") as store, store.batch():
        assert store.basis_ids()
        for basis in store.basis_ids():
            store.drop_basis(basis)
    return found


def precision(relevant: np.ndarray) -> float:
    """Average precision of one ranking (True where the artist is the query's)."""
    ranks = np.flatnonzero(relevant) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def mean_precision(world: World, db: Path, split: str) -> float:
    """mAP, percent."""
    found = []
    train = world.split("train")
    with Store.open(db) as store:
        for file in world.split(split):
            rows = list(similar(store, ask(store, str(world.folder / file)), EVERY))
            answers = [Path(row.path).name for row in rows]
            assert sorted(answers) == train
            artist = world.labels[file]["artist"]
            found.append(
                precision(np.array([world.labels[a]["artist"] == artist for a in answers]))
            )
    return 100 * float(np.mean(found))


#: (same, diff): with the collection's own basis, and without one.
LEAST = {
    "wild": ((89.3, 87.1), (71.0, 64.0)),
    "fixed": ((97.6, 91.9), (90.0, 79.0)),
    "thin": ((92.0, 85.3), (69.0, 57.0)),
}


@pytest.mark.parametrize("basis", [True, False], ids=["basis", "plain"])
def test_what_is_alike_comes_first(world: World, basis: bool) -> None:
    least = LEAST[world.folder.name][0 if basis else 1]
    db = world.db if basis else world.plain
    found = tuple(mean_precision(world, db, f"test_{setup}") for setup in ("same", "diff"))
    assert found[0] >= least[0] and found[1] >= least[1], found


@pytest.mark.parametrize("basis", [True, False], ids=["basis", "plain"])
def test_attention_only_copies_find_their_originals(
    world: World, basis: bool, tmp_path: Path
) -> None:
    full = [f for f in world.split("train") if world.labels[f]["groups"] == "all"][::2]
    assert len(full) >= 48
    wrong = []
    with Store.open(world.db if basis else world.plain) as store:
        for file in full:
            tensors = load_file(world.folder / file)
            kept = {key: t for key, t in tensors.items() if "_ff_" not in key and ".ff." not in key}
            assert len(kept) < len(tensors)
            v.write(tmp_path / "attention.safetensors", kept)
            asked = ask(store, str(tmp_path / "attention.safetensors"))
            first = next(similar(store, asked, Wishes(count=1, every=True)))
            # Over what both have, they are one and the same.
            if Path(first.path).name != file or (basis and first.score < 0.99):
                wrong.append((file, first.path, first.score))
    assert not wrong


def test_no_two_trainings_are_copies(world: World, tmp_path: Path) -> None:
    shutil.copyfile(world.db, tmp_path / "i.db")
    summary = index(tmp_path / "i.db", world.folder)
    assert summary.added + len(world.split("train")) >= len(world.labels)
    assert len(names(tmp_path / "i.db")) == len(world.labels)
    found = relations(tmp_path / "i.db")
    grades = defaultdict(list)
    for pair, relation in found.items():
        grades[relation["grade"]].append(tuple(sorted(pair)))
    assert set(grades) <= {"kin"}, grades
    # Kin can only be of one artist, whose trainings share their first matrices.
    for one, two in grades["kin"]:
        assert world.labels[one]["artist"] == world.labels[two]["artist"]
