"""Bases built from planted features: what is chosen, written, resumed and told."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from lorafind.bases import file
from lorafind.bases.judge import Material, Settings
from lorafind.bases.labels import Labelled
from lorafind.bases.problem import BasisProblem
from lorafind.bases.rebuild import Rebuilt, rebuild
from tests.bases.made import Dense, styles

ARTISTS, EACH = 8, 12
SPLITS = ["train"] * 6 + ["calibration"] * 2 + ["validation"] * 2 + ["test_same", "test_diff"]
SETTINGS = Settings("planted", metric="euclidean")


def material(width: int = 3000, signal: float = 0.22, feature: str = "delta") -> Material:
    rows, artist = styles(ARTISTS, EACH, width, signal)
    labels = [
        Labelled(Path(f"{k}.safetensors"), f"artist {a}", split=SPLITS[k % EACH], images=10)
        for k, a in enumerate(artist.tolist())
    ]
    return Material(
        Dense({"ff": rows}, step=500, feature=feature),
        "sd1",
        labels,
        np.zeros(len(rows), int),
        ["layout digest"],
        [f"{k:064x}" for k in range(len(rows))],
        np.ones(len(rows)),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, Rebuilt]:
    made = material()
    return made, rebuild(made, tmp_path_factory.mktemp("basis") / "basis.safetensors", SETTINGS)


def rows_of(made: Material, *splits: str) -> np.ndarray:
    assert made.labels is not None
    return np.flatnonzero([one.split in splits for one in made.labels])


def dense(made: Material) -> np.ndarray:
    assert isinstance(made.matrix, Dense)
    return made.matrix.blocks["ff"]


def test_the_file_holds_the_components_of_the_training_loras(
    built: tuple[Material, Rebuilt],
) -> None:
    made, found = built
    basis = file.load(found.path)
    k = basis.size
    train = dense(made)[rows_of(made, "train")]
    pca = PCA(k, svd_solver="full").fit(train)
    v = basis.array("components/ff").astype(np.float64)
    assert subspace_angles(v.T, pca.components_.T).max() < 2e-3  # float16
    np.testing.assert_allclose(basis.array("mean/ff"), train.mean(0), atol=1e-6)
    np.testing.assert_allclose(basis.array("gram/ff"), np.eye(k), atol=1e-6)
    centre = basis.array("centres/ff")
    assert centre.shape == (2, k)
    np.testing.assert_allclose(centre[0], v @ train.mean(0), atol=1e-3)
    file.self_test(found.path)


def test_the_number_of_components_is_the_best_on_validation(
    built: tuple[Material, Rebuilt],
) -> None:
    made, found = built
    assert made.labels is not None
    train, held = rows_of(made, "train"), rows_of(made, "validation")
    spare = rows_of(made, "calibration")
    artist = np.array([one.artist for one in made.labels])
    x = PCA(47, svd_solver="full").fit(dense(made)[train]).transform(dense(made))
    names = sorted(set(artist))
    mean = {rows: np.array([x[list(rows)][artist[list(rows)] == n].mean(0) for n in names])
            for rows in (tuple(train), tuple(spare))}  # fmt: skip
    figures = []
    for k in range(2, 48):
        y = x.copy()
        for j in range(k):
            columns = np.stack([mean[tuple(spare)][:, j], np.ones(ARTISTS)], 1)
            scale, offset = np.linalg.lstsq(columns, mean[tuple(train)][:, j])[0]
            y[held, j] = scale * x[held, j] + offset
        figures.append(
            np.mean(
                [
                    average_precision_score(
                        artist[train] == artist[q],
                        -np.linalg.norm(y[train, :k] - y[q, :k], axis=1),
                    )
                    for q in held
                ]
            )
        )
    assert found.facts["components"] == 2 + int(np.argmax(np.round(figures, 5)))
    told = next(row for row in found.facts["evaluation"] if row["split"] == "validation")
    assert told["euclidean_calibrated"] == pytest.approx(100 * max(figures), abs=0.01)


def test_calibration_gains_where_the_fit_drifts(built: tuple[Material, Rebuilt]) -> None:
    lines = {line.split: line for line in built[1].lines}
    assert set(lines) == {"validation", "test_same", "test_diff"}
    for line in lines.values():
        assert line.euclidean_calibrated is not None and line.cosine_calibrated is not None
        assert line.euclidean_calibrated > line.euclidean + 5
        assert line.cosine_calibrated > line.cosine + 5
        assert line.queries == (16 if line.split == "validation" else 8)


def test_facts_say_what_was_done(built: tuple[Material, Rebuilt]) -> None:
    found = built[1]
    facts = file.read_facts(found.path)
    assert facts == found.facts
    expected = {
        "feature": "delta",
        "groups": ["ff"],
        "weights": {"ff": 1.0},
        "architecture": "sd1",
        "loras": 48,
        "artists": 8,
        "seen": 48,
        "calibration": "scale and offset",
        "metric": "euclidean",
        "layouts": ["layout digest"],
        "computed": 47,
    }
    assert {key: facts[key] for key in expected} == expected
    assert sum(facts["explained_variance"]) == pytest.approx(1.0, abs=1e-3)
    assert file.load(found.path).array("contents").shape == (48, 32)


def test_the_metric_is_the_better_one_on_validation(tmp_path: Path) -> None:
    found = rebuild(material(), tmp_path / "b.safetensors", Settings("planted"))
    first = found.lines[0]
    figures = {metric: first.way(metric, True) for metric in ("cosine", "euclidean")}
    other = rebuild(material(), tmp_path / "o.safetensors", SETTINGS)
    assert max(figures.values()) == figures[found.facts["metric"]]
    assert first.way(found.facts["metric"], True) >= other.lines[0].way("euclidean", True)


def test_without_labels_the_eigenvalues_choose_and_nothing_is_calibrated(tmp_path: Path) -> None:
    made = replace(material(signal=1.0), labels=None)
    found = rebuild(made, tmp_path / "b.safetensors", Settings("planted"))
    assert found.facts["calibration"] == "none" and found.facts["metric"] == "cosine"
    assert found.facts["loras"] == 96 and found.lines == []
    assert ARTISTS - 1 <= found.facts["components"] <= ARTISTS + 2
    assert (file.load(found.path).array("scale") == 1).all()


class Cut(Dense):
    """Breaks off after some tiles."""

    left = 10**9

    def columns(self, group: str, tile: slice) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().columns(group, tile)


@pytest.mark.parametrize("after", [2, 5, 6, 9, 11])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch, built: tuple[Material, Rebuilt]
) -> None:
    monkeypatch.setattr("lorafind.bases.checkpoint.EVERY", 0.0)
    made = material()
    cut = Cut({"ff": dense(made)}, step=500)
    cut.left = after
    broken = replace(made, matrix=cut)
    with pytest.raises(KeyboardInterrupt):
        rebuild(broken, tmp_path / "b.safetensors", SETTINGS)
    assert not (tmp_path / "b.safetensors").exists()
    cut.left, cut.reads = 10**9, 0
    rebuild(broken, tmp_path / "b.safetensors", SETTINGS)
    # Six tiles in each of two passes; of those begun at most the last is read again, and the one
    # read ahead of it.
    assert cut.reads <= 12 - after + 2
    assert (tmp_path / "b.safetensors").read_bytes() == built[1].path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]


def test_a_state_of_other_loras_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafind.bases.checkpoint.EVERY", 0.0)
    made = material()
    cut = Cut({"ff": dense(made)}, step=500)
    cut.left = 9
    with pytest.raises(KeyboardInterrupt):
        rebuild(replace(made, matrix=cut), tmp_path / "b.safetensors", SETTINGS)
    other = Dense({"ff": dense(made)[::-1].copy()}, step=500)
    other.fingerprint = "other"
    rebuild(replace(made, matrix=other), tmp_path / "b.safetensors", SETTINGS)
    clean = tmp_path / "clean"
    clean.mkdir()
    rebuild(replace(made, matrix=other), clean / "b.safetensors", SETTINGS)
    assert (clean / "b.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert other.reads == 24


@pytest.mark.parametrize("between", ["another basis", "no part"])
def test_components_of_another_run_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str, built: tuple[Material, Rebuilt]
) -> None:
    monkeypatch.setattr("lorafind.bases.checkpoint.EVERY", 0.0)
    path, made = tmp_path / "b.safetensors", material()
    cut = Cut({"ff": dense(made)}, step=500)
    cut.left = 10
    broken = replace(made, matrix=cut)
    with pytest.raises(KeyboardInterrupt):
        rebuild(broken, path, SETTINGS)
    part = path.with_name(path.name + ".part")
    if between == "no part":
        part.unlink()
    else:
        # Broken off before it keeps a state of its own.
        monkeypatch.setattr("lorafind.bases.checkpoint.EVERY", 1e9)
        cut.left = 2
        with pytest.raises(KeyboardInterrupt):
            rebuild(broken, path, replace(SETTINGS, components=7))
    cut.left = 10**9
    rebuild(broken, path, SETTINGS)
    assert path.read_bytes() == built[1].path.read_bytes()


def test_validation_of_artists_that_do_not_train_chooses_nothing(tmp_path: Path) -> None:
    made = material()
    assert made.labels is not None
    labels = [
        replace(one, artist="stranger") if one.split == "validation" else one for one in made.labels
    ]
    without = [replace(one, split="test") if one.split == "validation" else one for one in labels]
    found = rebuild(replace(made, labels=labels), tmp_path / "b.safetensors", SETTINGS)
    other = rebuild(replace(made, labels=without), tmp_path / "o.safetensors", SETTINGS)
    assert found.facts["components"] == other.facts["components"] > 2
    assert {line.split for line in found.lines} == {"test_same", "test_diff"}


def test_too_few_loras_and_missing_folders_are_told(tmp_path: Path) -> None:
    made = material()
    assert made.labels is not None
    bare = replace(made, labels=[replace(one, split="test") for one in made.labels])
    with pytest.raises(BasisProblem, match="0 training LoRAs"):
        rebuild(bare, tmp_path / "b.safetensors", SETTINGS)
    with pytest.raises(BasisProblem, match="no folder"):
        rebuild(made, tmp_path / "none/b.safetensors", SETTINGS)


@pytest.mark.parametrize(
    ("name", "place"), [("components/ff", 7001), ("centres/ff", 3), ("offset", 7), ("gram/ff", 7)]
)
def test_damage_fails_the_self_test(
    tmp_path: Path, built: tuple[Material, Rebuilt], name: str, place: int
) -> None:
    path = tmp_path / "b.safetensors"
    shutil.copyfile(built[1].path, path)
    basis = file.load(path)
    info = basis.header.tensors[name]
    data = bytearray(path.read_bytes())
    data[basis.header.data_start + info.begin + place] ^= 0x7C
    path.write_bytes(data)
    if name == "gram/ff":
        # Not used where every group is there.
        file.self_test(path)
        return
    with pytest.raises(BasisProblem, match="self-test"):
        file.self_test(path)


def test_what_is_no_basis_is_told(tmp_path: Path, built: tuple[Material, Rebuilt]) -> None:
    path = tmp_path / "b.safetensors"
    with pytest.raises(BasisProblem, match="There is no file"):
        file.load(path)
    path.write_bytes(b"<html>")
    with pytest.raises(BasisProblem, match="is no basis"):
        file.load(path)
    data = built[1].path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(BasisProblem, match="is no basis"):
        file.load(path)
    path.write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 2'))
    with pytest.raises(BasisProblem, match="newer format"):
        file.load(path)
    path.write_bytes(data.replace(b'\\"components\\": ', b'\\"componentz\\": '))
    with pytest.raises(BasisProblem, match="does not say 'components'"):
        file.load(path)
    path.write_bytes(data.replace(b"lorafind-basis", b"somebodys-file"))
    with pytest.raises(BasisProblem, match="no basis of lorafind"):
        file.load(path)
