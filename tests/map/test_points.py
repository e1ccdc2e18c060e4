"""Places and neighbours, against ``similar`` and against scikit-learn."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from lorafind.bases.labels import read_labels
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import current
from lorafind.index.store import Store
from lorafind.map.collect import Wishes, collect
from lorafind.map.facts import points
from lorafind.map.nearest import BLOCK, nearest
from lorafind.map.points import Embedded, gather, largest, place
from lorafind.search.query import ask
from lorafind.search.similar import Wishes as Asked
from lorafind.search.similar import similar
from tests.search import small


def test_neighbours_are_those_of_similar(demo: Path) -> None:
    with Store.open(demo.parent / "i.db") as store:
        found = gather(store, largest(store))
        # Attention alone and everything: scores over what two LoRAs both have.
        assert len(np.unique(found.groups)) > 1
        near, scores = nearest(found, 6)
        told = points(store, found.ids.tolist())
        for row, point in enumerate(told):
            answers = list(similar(store, ask(store, point.path), Asked(count=6, every=True)))
            assert np.allclose([a.score for a in answers], scores[row], atol=5.1e-5)
            # Copies score alike, in either order.
            clear = np.abs(np.diff(scores[row])) > 1e-4
            for k in range(1, 5):
                if clear[k - 1] and clear[k]:
                    assert answers[k].path == told[near[row, k]].path


def test_places_are_the_first_components(demo: Path) -> None:
    with Store.open(demo.parent / "i.db") as store:
        architecture = largest(store)
        found = gather(store, architecture)
        basis = current(store, architecture)
        assert basis is not None
        stored = {
            int(lora): row["vector"]
            for ids, rows in store.chunks.scan("embedding", basis.id)
            for lora, row in zip(ids, rows, strict=True)
        }
    assert sorted(stored) == found.ids.tolist()
    for dimensions in (2, 3):
        flat = place(found.vectors, dimensions=dimensions)
        for lora, where in zip(found.ids.tolist(), flat, strict=True):
            assert np.array_equal(where, stored[lora][:dimensions].astype(float))


def test_few_components_are_filled_up() -> None:
    assert place(np.ones((4, 1)), dimensions=3).tolist() == [[1, 0, 0]] * 4


def test_tsne_keeps_clusters_and_repeats_itself() -> None:
    g = np.random.default_rng(0)
    truth = np.repeat(np.arange(6), 20)
    vectors = g.standard_normal((6, 12))[truth] + 0.1 * g.standard_normal((120, 12))
    made = place(vectors, "tsne")
    found = KMeans(6, n_init=10, random_state=0).fit_predict(made)
    assert adjusted_rand_score(truth, found) == 1.0
    assert np.array_equal(made, place(vectors, "tsne"))


@pytest.mark.parametrize("n", [5, 6, 12])
def test_tsne_of_a_handful(n: int) -> None:
    made = place(np.random.default_rng(n).standard_normal((n, 2)), "tsne", 3)
    assert made.shape == (n, 3) and np.isfinite(made).all()


def test_umap() -> None:
    pytest.importorskip("umap")
    vectors = np.random.default_rng(0).standard_normal((60, 8))
    assert place(vectors, "umap", 3).shape == (60, 3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no way to place"):
        place(np.ones((9, 3)), "pca")
    with pytest.raises(BasisProblem, match="needs 5"):
        place(np.ones((4, 3)), "tsne")


def test_more_than_a_block_and_masks_without_a_common_group(demo: Path) -> None:
    """Against a plain loop over all pairs."""
    g = np.random.default_rng(3)
    with Store.open(demo.parent / "i.db") as store:
        basis = gather(store, largest(store)).basis
    names = basis.spaces["model"].groups
    assert names[:3] == ("self_attn", "cross_attn", "ff")
    n = BLOCK + 60
    kinds = np.array([1, 2, 3, 7], np.uint8)
    groups = g.choice(kinds, n)
    parts = g.standard_normal((n, basis.width)).astype(np.float32)
    seen = g.random(n) < 0.5
    lists = {
        int(k): [x for b, x in enumerate(("self_attn", "cross_attn", "ff")) if k >> b & 1]
        for k in kinds
    }
    vectors = np.concatenate(
        [basis.vectors(parts[i : i + 1], lists[int(groups[i])], seen[i : i + 1]) for i in range(n)]
    ).astype(np.float32)
    found = Embedded(basis, np.arange(n), vectors, groups, parts, seen)
    near, scores = nearest(found, 4)
    for i in range(0, n, 40):
        plain = np.full(n, -np.inf)
        for j in range(n):
            both = sorted(set(lists[int(groups[i])]) & set(lists[int(groups[j])]))
            if i != j and both:
                a, b = (basis.vectors(parts[k : k + 1], both, seen[k : k + 1])[0] for k in (i, j))
                plain[j] = a @ b
        best = np.argsort(-plain, kind="stable")[:4]
        assert near[i].tolist() == best.tolist()
        assert np.allclose(scores[i], plain[best], atol=1e-5)


def test_an_even_choice_of_too_many(demo: Path) -> None:
    with Store.open(demo.parent / "i.db") as store:
        every = gather(store, largest(store))
        some = gather(store, largest(store), most=10)
    assert len(some.ids) == 10 and some.left_out == len(every.ids) - 10
    assert {some.ids[0], some.ids[-1]} == {every.ids[0], every.ids[-1]}
    row = {int(lora): k for k, lora in enumerate(every.ids)}
    for k, lora in enumerate(some.ids.tolist()):
        assert np.array_equal(some.vectors[k], every.vectors[row[lora]])
        assert np.array_equal(some.parts[k], every.parts[row[lora]])


def test_no_basis_and_no_such_architecture(tmp_path: Path) -> None:
    for k in range(3):
        small.save(tmp_path / "loras" / f"{k}.safetensors", small.random(k))
    small.index(tmp_path / "i.db", tmp_path / "loras", relate=False)
    with Store.open(tmp_path / "i.db") as store:
        with pytest.raises(BasisProblem, match="30 unrelated"):
            collect(store, Wishes())
        with pytest.raises(BasisProblem, match="no LoRA of 'sdxl'"):
            collect(store, Wishes("sdxl"))
        with pytest.raises(BasisProblem, match="no basis 'mine'"):
            collect(store, Wishes(basis="mine"))


def test_the_map_of_fontbench_separates_its_fonts(shared: Path, tmp_path: Path) -> None:
    """Of the training files in the wild world, by t-SNE; the first components show the genres."""
    wild = shared / "loras/fontbench/wild"
    labels = [one for one in read_labels(wild) if one.split == "train"]
    (tmp_path / "train").mkdir()
    for one in labels:
        shutil.copy2(one.path, tmp_path / "train")
    small.index(tmp_path / "i.db", tmp_path / "train")
    with Store.open(tmp_path / "i.db") as store:
        made = collect(store, Wishes(layout="tsne", labels=labels, groups=20))
    fonts = [point.label for point in made.points]
    assert made.matched == 160 and set(Counter(fonts).values()) == {8}
    found = KMeans(20, n_init=10, random_state=0).fit_predict(made.flat)
    assert adjusted_rand_score(fonts, found) >= 0.88
