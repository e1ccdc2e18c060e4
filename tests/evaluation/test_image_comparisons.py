"""Scenarios and embedding similarity against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.images import Features, embedding_similarity, scenarios


def features(seed: int, names: list[str], width: int = 7) -> Features:
    rng = np.random.default_rng(seed)
    return Features({name: rng.normal(2, 1, width).astype(np.float32) for name in names})


def test_four_scenarios_are_the_cosines_of_every_pair_of_kinds() -> None:
    names = ["a", "b", "c", "d", "e"]
    kinds = {"original": features(0, names), "generated": features(1, names)}
    queries, base = ["d", "b"], ["e", "a", "c"]
    got = scenarios(kinds, queries, base)
    assert [(one.query, one.base) for one in got] == [
        ("original", "original"),
        ("original", "generated"),
        ("generated", "original"),
        ("generated", "generated"),
    ]
    for one in got:
        assert one.queries == ("d", "b") and one.candidates == ("e", "a", "c")
        left = [kinds[one.query].rows[name] for name in queries]
        right = [kinds[one.base].rows[name] for name in base]
        np.testing.assert_allclose(one.cosines, cosine_similarity(left, right), atol=1e-6)


def test_every_scenario_is_about_the_same_loras() -> None:
    kinds = {"original": features(0, ["a", "b", "c"]), "generated": features(1, ["b", "c", "d"])}
    for one in scenarios(kinds, ["a", "b"], ["c", "d"]):
        assert one.queries == ("b",) and one.candidates == ("c",)
    (alone,) = scenarios({"images": kinds["original"]}, ["a", "b"], ["c", "d"])
    assert (alone.query, alone.base) == ("images", "images")
    assert alone.queries == ("a", "b") and alone.candidates == ("c",)
    with pytest.raises(BasisProblem, match="No data base LoRA has original and generated images"):
        scenarios(kinds, ["b"], ["a", "d"])
    with pytest.raises(BasisProblem, match="No query LoRA has"):
        scenarios(kinds, [], ["b"])
    with pytest.raises(ValueError, match="one encoder"):
        scenarios({"x": features(0, ["a"]), "y": features(0, ["a"], width=5)}, ["a"], ["a"])


def planted(n: int = 40, k: int = 5, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """LoRA coordinates, and image features that hold them, turned about, with some noise."""
    rng = np.random.default_rng(3)
    coordinates = rng.normal(size=(n, k)) * np.array([16, 8, 4, 2, 1])
    directions = np.linalg.qr(rng.normal(size=(width, k)))[0]
    image = coordinates @ directions.T + 0.3 * rng.normal(size=(n, width)) + 100
    return coordinates, image


def test_embedding_similarity_is_the_cosine_with_scikit_learns_components() -> None:
    lora, image = planted()
    lora += 7  # an offset of the coordinates is no dissimilarity
    got = embedding_similarity(lora, image)
    assert got.components == 5
    centred, theirs = lora - lora.mean(0), PCA(5, svd_solver="full").fit_transform(image)
    for j in range(5):
        a, b = centred[:, j], theirs[:, j]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        theirs[:, j] *= np.sign(cosine)
        assert got.per_component[j] == pytest.approx(abs(cosine), abs=1e-9)
    rows = np.array([cosine_similarity(centred[[i]], theirs[[i]])[0, 0] for i in range(len(lora))])
    np.testing.assert_allclose(got.per_lora, rows, atol=1e-9)
    assert got.mean == pytest.approx(rows.mean())
    whole = (centred * theirs).sum() / np.linalg.norm(centred) / np.linalg.norm(theirs)
    assert got.overall == pytest.approx(whole)
    # Planted to agree: the first components do, the weakest, at the level of the noise, less.
    assert got.per_component[:2].min() > 0.95 and got.overall > 0.95 and got.mean > 0.9


def test_the_signs_of_components_do_not_matter() -> None:
    lora, image = planted()
    straight = embedding_similarity(lora, image)
    turned = embedding_similarity(lora * np.array([-1, 1, -1, -1, 1]), image)
    np.testing.assert_allclose(turned.per_component, straight.per_component)
    np.testing.assert_array_equal(turned.signs * straight.signs, [-1, 1, -1, -1, 1])
    assert turned.overall == pytest.approx(straight.overall)
    assert turned.mean == pytest.approx(straight.mean)


def test_unrelated_embeddings_are_at_chance() -> None:
    rng = np.random.default_rng(5)
    n = 50
    found = np.concatenate(
        [
            embedding_similarity(rng.normal(size=(n, 6)), rng.normal(size=(n, 20))).per_component
            for _ in range(60)
        ]
    )
    assert embedding_similarity(np.ones((n, 1)), rng.normal(size=(n, 2))).overall == 0
    chance = embedding_similarity(rng.normal(size=(n, 6)), rng.normal(size=(n, 20))).chance
    # 360 cosines: the standard error of their mean is 0.0045.
    assert found.mean() == pytest.approx(chance, abs=0.02)


def test_only_components_that_the_images_have() -> None:
    rng = np.random.default_rng(6)
    assert embedding_similarity(rng.normal(size=(4, 9)), rng.normal(size=(4, 20))).components == 3
    assert embedding_similarity(rng.normal(size=(30, 9)), rng.normal(size=(30, 2))).components == 2
    flat = (rng.normal(size=(30, 3)) @ rng.normal(size=(3, 20))).astype(np.float32)
    assert embedding_similarity(rng.normal(size=(30, 9)), flat).components == 3
    with pytest.raises(BasisProblem, match="2 at least"):
        embedding_similarity(np.ones((1, 3)), np.ones((1, 4)))
    with pytest.raises(BasisProblem, match="same features"):
        embedding_similarity(rng.normal(size=(5, 3)), np.full((5, 4), 0.1, np.float32))
    with pytest.raises(ValueError, match="do not hold the same"):
        embedding_similarity(np.ones((5, 3)), np.ones((4, 4)))
