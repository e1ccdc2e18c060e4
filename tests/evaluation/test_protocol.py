"""The protocol on planted vectors, against scikit-learn on the vectors themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA

from lorafind.bases.kernel import Kernel
from lorafind.bases.labels import Labelled
from lorafind.bases.metrics import clusters
from lorafind.evaluation.drift import drift, part
from lorafind.evaluation.protocol import GRID, Settings, Space, combinations, protocol
from lorafind.evaluation.run import subject_of
from lorafind.evaluation.scoring import centred
from lorafind.evaluation.unseen import unseen
from tests.evaluation.planted import mean_precision, of, only, subject, vectors

NUMBER = 11


@pytest.fixture(scope="module")
def planted() -> tuple[np.ndarray, list[Labelled]]:
    return vectors()


def distances(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return -np.linalg.norm(one[:, None] - two, axis=2)


class Oracle:
    """The same from scikit-learn's components of the vectors themselves."""

    def __init__(self, rows: np.ndarray, labels: Sequence[Labelled], k: int) -> None:
        self.train, self.test = of(labels, "train"), of(labels, "test")
        self.artists = np.array([one.artist for one in labels])
        pca = PCA(k, svd_solver="full").fit(rows[self.train])
        self.raw = pca.transform(rows)
        self.calibrated = self.raw.copy()
        names = np.unique(self.artists)
        means = {
            split: np.stack(
                [self.raw[of(labels, split) & (self.artists == a)].mean(0) for a in names]
            )
            for split in ("calibration", "train")
        }
        for j in range(k):
            columns = np.stack([means["calibration"][:, j], np.ones(len(names))], 1)
            (scale, offset), *_ = np.linalg.lstsq(columns, means["train"][:, j])
            self.calibrated[:, j] = scale * self.raw[:, j] + offset

    def precision(self, queries: np.ndarray) -> float:
        scores = distances(queries[self.test], self.raw[self.train])
        return mean_precision(scores, self.artists[self.test], self.artists[self.train])


def test_figures_are_those_of_scikit_learns_components(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    oracle = Oracle(rows, labels, NUMBER)
    found = protocol(subject(rows, labels), Settings(components=(NUMBER,)))
    wanted = {"split": "test", "basis": "components", "metric": "euclidean"}
    plain = only(found, calibration="none", **wanted)
    assert plain.map == pytest.approx(oracle.precision(oracle.raw), abs=1e-6)
    calibrated = only(found, calibration="scale and offset", **wanted)
    assert calibrated.map == pytest.approx(oracle.precision(oracle.calibrated), abs=1e-6)
    assert plain.queries == 36


def test_without_components_the_cosines_of_the_vectors(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    train, test = of(labels, "train"), of(labels, "test")
    artists = np.array([one.artist for one in labels])
    found = protocol(subject(rows, labels), Settings(components=(2,)))
    for basis, moved in (("none", rows), ("mean", rows - rows[train].mean(0))):
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        expected = mean_precision(unit[test] @ unit[train].T, artists[test], artists[train])
        row = only(found, split="test", basis=basis, metric="cosine")
        assert row.map == pytest.approx(expected, abs=1e-6)


def test_calibration_repairs_the_drift(planted: tuple[np.ndarray, list[Labelled]]) -> None:
    rows, labels = planted
    assert rows.shape[1] > 100 * len(rows)
    whole = subject(rows, labels)
    # The drift first: unseen LoRAs lie near the centre, far from the training LoRAs of their
    # artist, and the more so the fewer there are.
    settings = Settings(components=(NUMBER,))
    drifted = drift(whole, settings)
    oracle = Oracle(rows, labels, NUMBER)
    size = {
        split: np.sqrt((oracle.raw[getattr(oracle, split)] ** 2).sum(1).mean())
        for split in ("train", "test")
    }
    last = only(drifted, split="test", calibration="none", per_artist=8)
    assert last.spread == pytest.approx(size["test"] / size["train"], abs=1e-6)
    assert last.spread is not None and last.spread < 0.5
    by_size = [
        only(drifted, split="test", calibration="none", per_artist=size) for size in (2, 3, 4, 6, 8)
    ]
    spreads = [row.spread for row in by_size if row.spread is not None]
    away = [row.distance for row in by_size if row.distance is not None]
    assert spreads == sorted(spreads) and away == sorted(away, reverse=True)
    assert spreads[0] < 0.25 and away[0] > 0.75

    repaired = only(drifted, split="test", calibration="scale and offset", per_artist=8)
    assert repaired.spread is not None and 0.85 < repaired.spread < 1.1
    assert repaired.distance is not None and repaired.distance < 0.4 * away[-1]

    # It shows where LoRAs are looked for by distance, the more the more components there are.
    found = protocol(whole, Settings(components=(NUMBER, 40)))
    for k, least in ((NUMBER, 15), (40, 30)):
        wanted = {"split": "test", "basis": "components", "metric": "euclidean", "components": k}
        before = only(found, calibration="none", **wanted).map
        for kind in ("scale and offset", "scale only", "without labels"):
            after = only(found, calibration=kind, **wanted).map
            assert before is not None and after is not None
            assert after > before + least and after > 85
    scales = Space(whole, whole.rows("train")).calibration("scale and offset", NUMBER)
    assert 1 < scales.scale[0] < scales.scale[5]


def test_copies_of_training_loras_are_not_calibrated(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    whole = subject(rows, labels)
    contents = list(whole.contents)
    test, train = whole.rows("test")[0], whole.rows("train")[0]
    contents[test] = contents[train]
    space = Space(replace(whole, contents=contents), whole.rows("train"))
    fix = space.calibration("scale and offset", 5)
    raw, placed = space.coordinates(5), space.placed("scale and offset", 5)
    np.testing.assert_array_equal(placed[test], raw[test])
    np.testing.assert_array_equal(placed[whole.rows("train")], raw[whole.rows("train")])
    other = whole.rows("test")[1]
    np.testing.assert_allclose(placed[other], fix.scale * raw[other] + fix.offset)


def test_calibration_without_labels(planted: tuple[np.ndarray, list[Labelled]]) -> None:
    rows, labels = planted
    whole = subject(rows, labels)
    space = Space(whole, whole.rows("train"))
    train = of(labels, "train")
    values = np.linalg.svd(rows[train] - rows[train].mean(0), compute_uv=False)[:-1] ** 2
    share = ((values - np.median(values)) / values)[:5]
    raw, placed = space.coordinates(5), space.placed("without labels", 5)
    np.testing.assert_allclose(placed[train], raw[train] * np.sqrt(share), rtol=1e-6)
    np.testing.assert_allclose(placed[~train], raw[~train] / np.sqrt(share), rtol=1e-6)


def test_artists_that_the_basis_has_not_seen() -> None:
    rows, labels = vectors(width=1000, signal=0.1)
    artists = np.array([one.artist for one in labels])
    order = sorted(set(artists.tolist()))
    known = np.isin(artists, order[::2])
    base, test = of(labels, "train") & ~known, of(labels, "test") & ~known
    found = unseen(subject(rows, labels), Settings(components=(2,)))

    def expected(moved: np.ndarray) -> float:
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        return mean_precision(unit[test] @ unit[base].T, artists[test], artists[base])

    def placed(who: np.ndarray) -> np.ndarray:
        pca = PCA(2, svd_solver="full").fit(rows[who & of(labels, "train")])
        made: np.ndarray = pca.transform(rows)
        return made

    for basis, moved in (
        ("none", rows),
        ("mean of others", rows - rows[known].mean(0)),
        ("components of others", placed(known)),
        ("components of their own", placed(~known)),
    ):
        row = only(found, basis=basis, metric="cosine", split="test")
        assert row.map == pytest.approx(expected(moved), abs=1e-6), basis
        assert row.queries == test.sum() == 18
        # Not so easy that any order will do.
        assert row.map is not None and row.map < 99


def test_the_best_number_on_validation_is_marked(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    found = protocol(subject(rows, labels), Settings())
    for kind in ("none", "scale and offset"):
        mine = [r for r in found if (r.calibration, r.metric) == (kind, "euclidean")]
        maps = {r.components: round(r.map or 0, 3) for r in mine if r.split == "validation"}
        assert set(GRID) - {100} <= set(maps)
        best = min(k for k in maps if maps[k] == max(maps.values()))
        assert {r.components for r in mine if r.chosen} == {best}
        # Clusters take long: only for the chosen number.
        assert {r.components for r in mine if r.ari is not None} == {best}
    assert only(found, split="train", calibration="none", metric="euclidean", chosen=True).ari
    # Without labels validation has no say.
    whole = subject(rows, labels)
    number = Space(whole, whole.rows("train")).unlabelled
    free = [r for r in found if (r.calibration, r.metric) == ("without labels", "euclidean")]
    assert {r.components for r in free if r.chosen} == {number}
    validated = {r.components: r.map for r in free if r.split == "validation"}
    assert validated[5] == validated[number] and number > 5


def test_every_number_has_clusters_when_asked(planted: tuple[np.ndarray, list[Labelled]]) -> None:
    rows, labels = planted
    found = protocol(subject(rows, labels), Settings(components=(5, 11), every=True))
    with_clusters = {(r.components, r.split) for r in found if r.ari is not None}
    assert with_clusters == {(k, s) for k in (5, 11) for s in ("train", "validation", "test")}


def test_without_validation_the_eigenvalues_choose(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    relabelled = [replace(o, split=o.split.replace("validation", "train")) for o in labels]
    found = protocol(subject(rows, relabelled), Settings())
    (chosen,) = {r.components for r in found if r.basis == "components" and r.chosen}
    whole = subject(rows, relabelled)
    assert chosen == Space(whole, whole.rows("train")).unlabelled
    assert 6 <= chosen <= 14
    assert not [r for r in found if r.split == "validation"]


def test_without_calibration_loras_there_is_none(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    relabelled = [replace(o, split=o.split.replace("calibration", "train")) for o in labels]
    found = protocol(subject(rows, relabelled), Settings(components=(5,)))
    assert {r.calibration for r in found} == {"none", "without labels"}


def test_without_genres_there_are_no_figures_of_genres(
    planted: tuple[np.ndarray, list[Labelled]],
) -> None:
    rows, labels = planted
    with_genres = protocol(subject(rows, labels), Settings(components=(5,)))
    without = protocol(
        subject(rows, [replace(o, genre="") for o in labels]), Settings(components=(5,))
    )
    assert all(r.genre_precision is not None for r in with_genres if r.map is not None)
    assert all(r.genre_precision is None for r in without)


def test_a_lora_without_a_genre_does_not_ask_for_one() -> None:
    rows, labels = vectors(artists=6, width=60, signal=0.5)
    some = [replace(o, genre="" if o.artist < "artist 03" else o.genre) for o in labels]
    whole = subject(rows, some)
    train, test = of(some, "train"), of(some, "test")
    genres = np.array([o.genre for o in some])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    asking = test & (genres != "")
    first = np.argsort(-unit[asking] @ unit[train].T, 1)[:, :10]
    expected = (genres[train][first] == genres[asking][:, None]).mean()
    row = only(protocol(whole, Settings()), basis="none", metric="cosine", split="test")
    assert row.genre_precision == pytest.approx(100 * expected)


def test_clusters_by_cosine_are_of_directions() -> None:
    rows, labels = vectors(artists=5, width=300, signal=3.0)
    lengths = np.geomspace(1, 8, len(rows))
    stretched = rows * np.random.default_rng(5).permutation(lengths)[:, None]
    found = protocol(subject(stretched, labels), Settings(components=(5,)))
    train = of(labels, "train")
    points = PCA(5, svd_solver="full").fit_transform(stretched[train])
    directions = points / np.linalg.norm(points, axis=1, keepdims=True)
    artists = [one.artist for one in labels if one.split == "train"]
    aris = []
    for metric, expected in (("cosine", directions), ("euclidean", points)):
        row = only(found, metric=metric, split="train", calibration="none")
        made = clusters(expected, artists)
        assert made is not None and row.ari == pytest.approx(100 * made.ari)
        aris.append(made.ari)
    assert aris[0] > aris[1] + 0.2


def test_parts_of_the_training_set() -> None:
    rows, labels = vectors(artists=3, width=10)
    whole = subject(rows, labels)
    train = whole.rows("train")[:-3]
    few, more = (part(whole, train, size, seed=0) for size in (2, 6))
    counts = [list(np.unique(whole.artists[p], return_counts=True)[1]) for p in (few, more)]
    assert counts == [[2, 2, 2], [6, 6, 5]]
    assert set(few) < set(more) < set(train)
    assert set(few) != set(part(whole, train, 2, seed=1))


def test_weights_of_groups() -> None:
    rows, labels = vectors(artists=5, width=200, signal=0.4)
    halves = {"self_attn": rows[:, :100], "ff": rows[:, 100:]}
    kernel = Kernel(
        {g: x @ x.T for g, x in halves.items()},
        {g: np.ones(len(rows), bool) for g in halves},
    )
    weights = {"self_attn": 0.3, "ff": 2.0}
    contents = [str(i) for i in range(len(rows))]
    whole = subject_of("style", kernel, labels, np.zeros(len(rows), int), contents, weights)
    joined = np.concatenate(
        [weights[g] * x / np.linalg.norm(x, axis=1, keepdims=True) for g, x in halves.items()],
        1,
    )
    train, test = of(labels, "train"), of(labels, "test")
    artists = np.array([one.artist for one in labels])
    found = protocol(whole, Settings(components=(3,)))
    for basis, moved in (
        ("none", joined),
        ("mean", joined - joined[train].mean(0)),
        ("components", PCA(3, svd_solver="full").fit(joined[train]).transform(joined)),
    ):
        unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        expected = mean_precision(unit[test] @ unit[train].T, artists[test], artists[train])
        row = only(found, basis=basis, metric="cosine", split="test", calibration="none")
        assert row.map == pytest.approx(expected, abs=1e-6), basis


def test_means_of_layouts() -> None:
    rows, labels = vectors(artists=10, width=100, signal=0.5)
    layouts = (np.arange(len(rows)) // 2) % 2
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows += np.where(layouts[:, None], 0.5, -0.5) * np.eye(100)[0]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kernel = Kernel({"ff": rows @ rows.T}, {"ff": np.ones(len(rows), bool)})
    whole = subject_of("style", kernel, labels, layouts, [str(i) for i in range(len(rows))])
    train = of(labels, "train")
    moved = rows.copy()
    for layout in (0, 1):
        # 40 of each: nothing is borrowed from the mean of all.
        assert (train & (layouts == layout)).sum() == 40
        moved[layouts == layout] -= rows[train & (layouts == layout)].mean(0)
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(centred(whole, np.flatnonzero(train)), unit @ unit.T, atol=1e-10)


def test_groups_and_what_a_lora_lacks() -> None:
    rows, labels = vectors(artists=6, width=400, signal=1.0)
    halves = {"self_attn": rows[:, :200].copy(), "ff": rows[:, 200:].copy()}
    halves["ff"][::3] = 0
    present = {g: np.asarray(x.any(1)) for g, x in halves.items()}
    kernel = Kernel({g: x @ x.T for g, x in halves.items()}, present)
    contents = [str(i) for i in range(len(rows))]
    layouts = present["ff"].astype(int)
    # Lengths count in ΔW, where a missing group is zero: as one vector.
    raw = subject_of("delta", kernel, labels, layouts, contents)
    space = Space(raw, raw.rows("train"))
    joined = np.concatenate(list(halves.values()), 1)
    pca = PCA(4, svd_solver="full").fit(joined[raw.rows("train")])
    np.testing.assert_allclose(
        np.abs(space.coordinates(4)), np.abs(pca.transform(joined)), atol=1e-8
    )
    # In style only directions count, and what is missing is left out.
    style = subject_of("style", kernel, labels, layouts, contents, {"ff": 0.5})
    assert style.weights == {"self_attn": 1.0, "ff": 0.5}
    np.testing.assert_allclose(np.diag(style.kernel.grams["self_attn"]), 1.0)
    alone = Space(style.only(("self_attn",)), style.rows("train"))
    lacking = ~present["ff"]
    assert np.linalg.norm(Space(style, style.rows("train")).coordinates(4)[lacking]) > 1
    assert alone.coordinates(4).shape == (len(rows), 4)
    assert combinations(style, Settings()) == {
        "all": ("self_attn", "ff"),
        "self_attn": ("self_attn",),
        "ff": ("ff",),
    }
    asked = Settings(groups={"both": ("ff", "self_attn"), "none": ("conv",)})
    assert combinations(style, asked) == {"both": ("self_attn", "ff")}


def test_a_group_that_no_training_lora_has() -> None:
    rows, labels = vectors(artists=4, width=50, signal=1.0)
    rows[of(labels, "train")] = 0
    n = len(rows)
    kernel = Kernel({"ff": rows @ rows.T}, {"ff": np.asarray(rows.any(1))})
    whole = subject_of("style", kernel, labels, np.zeros(n, int), [str(i) for i in range(n)])
    assert {row.basis for row in protocol(whole, Settings())} == {"none", "mean"}
    assert drift(whole, Settings()) == []
    assert {row.basis for row in unseen(whole, Settings())} == {"none", "mean of others"}
