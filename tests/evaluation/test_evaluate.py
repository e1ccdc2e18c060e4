"""`eval` on planted files and pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorafind.bases.labels import Labelled
from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.baselines import picture_names, resemblance, retrieved
from lorafind.evaluation.images import Features
from lorafind.evaluation.protocol import Settings, Space
from lorafind.evaluation.run import Report, Wishes, evaluate
from tests.evaluation.planted import collection, mean_precision, of, only, subject, vectors


def test_images_of_loras() -> None:
    rows, labels = vectors(width=2000)
    names = picture_names(labels)
    rng = np.random.default_rng(9)
    artists = np.array([one.artist for one in labels])
    styles = {a: rng.normal(size=16) for a in set(artists.tolist())}
    kinds = {
        kind: Features(
            {
                name: (styles[a] + noise * rng.normal(size=16)).astype(np.float32)
                for name, a in zip(names, artists, strict=True)
            }
        )
        for kind, noise in (("original", 0.3), ("generated", 2.0))
    }
    found = retrieved("clip", kinds, labels, 0)
    base, test = of(labels, "train"), of(labels, "test")
    points = {
        k: f.matrix(names) / np.linalg.norm(f.matrix(names), axis=1)[:, None]
        for k, f in kinds.items()
    }
    maps = {}
    for one in kinds:
        for two in kinds:
            row = only(found, split="test", scenario=f"{one} → {two}")
            scores = points[one][test] @ points[two][base].T
            expected = mean_precision(scores, artists[test], artists[base])
            assert row.map == pytest.approx(expected, abs=1e-4)
            maps[one, two] = row.map or 0.0
    assert maps["original", "original"] > 90 > maps["generated", "generated"]
    assert only(found, split="train", scenario="original").ari == pytest.approx(100)

    # Embeddings of the same LoRAs resemble one another where artists decide both.
    told: list[str] = []
    whole = subject(rows, labels)
    space = Space(whole, whole.rows("train"))
    same = Features({n: r.astype(np.float32) for n, r in zip(names, rows[:, :2000], strict=True)})
    flat = Features({n: np.ones(4, np.float32) for n in names})
    rows_of = resemblance("dino", {"a": same, "b": flat}, space, 3, told.append)
    (row,) = rows_of
    assert row.scenario == "a" and row.components == 3 and row.queries == 96
    assert row.similarity is not None and 0 < row.similarity <= 1
    assert "same features" in told[0]


def test_two_artists_may_use_one_name() -> None:
    labels = [Labelled(Path("x/one.safetensors"), "x"), Labelled(Path("y/one.safetensors"), "y")]
    assert picture_names(labels) == ["x/one", "y/one"]
    assert picture_names(labels[:1]) == ["one"]


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collections")
    collection(folder / "uniform", uniform=True)
    collection(folder / "mixed", uniform=False)
    return folder


FEW = Settings(groups={"all": ("cross_attn",)}, components=(4,))


def precisions(report: Report) -> dict[str, float]:
    """Feature → mAP of test on components, Euclidean, uncalibrated."""
    return {
        row.feature: row.map or 0.0
        for row in report.rows
        if (row.table, row.split, row.basis) == ("protocol", "test", "components")
        and (row.calibration, row.metric) == ("none", "euclidean")
    }


def test_style_retrieves_where_theta_cannot(collections: Path) -> None:
    wishes = Wishes(features=("style", "delta", "theta"), settings=FEW)
    found = precisions(evaluate(collections / "uniform", wishes))
    assert all(found[feature] > 95 for feature in ("style", "delta", "theta")), found
    report = evaluate(collections / "mixed", wishes)
    found = precisions(report)
    # At random the mean average precision of five artists is about 24 percent.
    assert found["style"] > 95 and found["theta"] < 40 and found["delta"] < 55, found
    assert any("theta is filled up with zeros" in note for note in report.notes)
    assert report.refused == []
    assert report.notes[0].startswith("60 LoRAs of 5 artists: ")


def test_bad_files_are_named_and_features_that_do_not_fit(
    collections: Path, tmp_path: Path
) -> None:
    place = tmp_path / "mixed"
    for artist in sorted((collections / "mixed").iterdir()):
        (place / artist.name).mkdir(parents=True)
        for file in artist.iterdir():
            (place / artist.name / file.name).hardlink_to(file)
    (place / "artist-0" / "broken.safetensors").write_bytes(b"no header")
    report = evaluate(place, Wishes(features=("style", "delta"), settings=FEW))
    ((path, reason),) = report.refused
    assert path.endswith("broken.safetensors") and reason
    assert len(precisions(report)) == 2
    with pytest.raises(BasisProblem, match=r"style is left out: None of 61 files"):
        evaluate(place, Wishes(features=("style",), settings=Settings({"x": ("conv",)})))


def test_inner_products_are_kept(collections: Path, tmp_path: Path) -> None:
    wishes = Wishes(features=("theta",), settings=FEW, cache=tmp_path / "cache")
    first = precisions(evaluate(collections / "uniform", wishes))
    (kept,) = (tmp_path / "cache").iterdir()
    assert precisions(evaluate(collections / "uniform", wishes)) == first
    # What is kept is what is used.
    with np.load(kept) as state:
        arrays = {name: state[name] for name in state.files}
    (name,) = [name for name in arrays if name.startswith("gram/")]
    shuffled = np.random.default_rng(0).permutation(len(arrays[name]))
    arrays[name] = arrays[name][np.ix_(shuffled, shuffled)]
    np.savez(kept, **arrays)
    assert precisions(evaluate(collections / "uniform", wishes))["theta"] < 60 < first["theta"]


def test_splits_differ_with_the_seed(collections: Path) -> None:
    made = [
        evaluate(
            collections / "uniform", Wishes(features=("style",), settings=replace(FEW, seed=seed))
        )
        for seed in (0, 0, 1)
    ]
    splits = [[one.split for one in report.sights[0].labels] for report in made]
    assert splits[0] == splits[1] != splits[2]
    assert [r for r in made[0].rows if r.table != "drift"] == [
        r for r in made[1].rows if r.table != "drift"
    ]


def test_too_few_train(tmp_path: Path, collections: Path) -> None:
    (tmp_path / "a").mkdir()
    for file in sorted((collections / "uniform" / "artist-0").iterdir())[:2]:
        (tmp_path / "a" / file.name).hardlink_to(file)
    with pytest.raises(BasisProblem, match="2 training LoRAs are too few"):
        evaluate(tmp_path, Wishes(features=("style",)))
