"""The door to the features: what is refused, what comes out, and the figures of real LoRAs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score

from lorafind.bases import kernel
from lorafind.bases.kernel import Kernel
from lorafind.bases.problem import BasisProblem
from lorafind.features.opening import FEATURES, open_feature, parse_groups
from lorafind.index.build import build
from lorafind.index.progress import Silent
from lorafind.index.store import Store
from tests.search.made_files import LAYERS, make, write

LINEAR = [name for name in LAYERS if name.startswith("unet") and "resnets" not in name]


def lora(place: Path, seed: int = 0, names: list[str] | None = None) -> Path:
    return write(place, make("lora", seed, names or LINEAR)[0])


class Told(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []
        self.done = 0

    def stage(self, title: str, files: int, size: int) -> None:
        self.stages.append((title, files, size))

    def advance(self, files: int, size: int) -> None:
        self.done += files


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("feature", list(FEATURES))
def test_bad_files_are_told_and_the_others_taken(tmp_path: Path, feature: str) -> None:
    good = [lora(tmp_path / f"{k}.safetensors", k) for k in range(3)]
    tensors = make("lora", 0, LINEAR)[0]
    broken = write(tmp_path / "nan.safetensors", tensors)
    raw = bytearray(broken.read_bytes())
    raw[-2:] = b"\xff\xff"
    broken.write_bytes(raw)
    zero = {k: torch.zeros_like(t) if "up" in k else t for k, t in tensors.items()}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good[0].read_bytes()[:-100])
    sdxl = write(
        tmp_path / "sdxl.safetensors",
        {
            f"lora_unet_input_blocks_4_1_transformer_blocks_{k}_attn2_to_k.lora_{way}.weight": x
            for k in (0, 1)
            for way, x in (("down", torch.ones(2, 2048)), ("up", torch.ones(640, 2)))
        },
    )
    text = lora(tmp_path / "text.safetensors", 5, [n for n in LAYERS if n.startswith("te")])
    pickle = tmp_path / "old.pt"
    torch.save(tensors, pickle)
    paths = [
        tmp_path / "none.safetensors",
        good[0],
        broken,
        good[1],
        write(tmp_path / "zero.safetensors", zero),
        cut,
        sdxl,
        tmp_path,
        text,
        pickle,
        good[2],
    ]
    watch = Told()
    opened = open_feature(feature, paths, watch=watch)
    assert opened.rows == [1, 3, 10] and opened.matrix.count == 3
    told = {os.path.basename(path): why for path, why in opened.refused}
    for name, why in {
        "none.safetensors": "does not exist",
        "nan.safetensors": "not all finite",
        "zero.safetensors": "ΔW is zero",
        "cut.safetensors": "missing",
        "sdxl.safetensors": "is for sdxl, most of the files are for sd1",
        tmp_path.name: "is a folder",
        "text.safetensors": "changes nothing in the groups asked for",
        "old.pt": "--allow-pickle",
    }.items():
        assert why in told.pop(name)
    assert not told
    assert opened.architecture == "sd1" and set(opened.architectures) <= {"sd1", "sd1-or-sd2"}
    assert watch.stages[0][:2] == ("Reading", 8) and watch.done == 8


def test_nothing_to_use_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BasisProblem, match=r"^None of 2 files can be used: a: it does not exist$"):
        open_feature("style", [tmp_path / "a", tmp_path / "b"])
    path = lora(tmp_path / "x.safetensors", names=LINEAR[:1])
    with pytest.raises(BasisProblem, match="changes nothing in the groups asked for"):
        open_feature("style", [path], ["ff"])


def test_wrong_words_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tetha' is no feature; choose from style, "):
        open_feature("tetha", [])
    with pytest.raises(ValueError, match="'foo' is no group; choose from self, "):
        open_feature("style", [tmp_path], ["foo"])


def test_groups_by_words_and_by_name() -> None:
    unet = ("self_attn", "cross_attn", "ff", "conv", "other")
    assert parse_groups(()) == unet
    assert parse_groups(("ff", "self")) == ("self_attn", "ff")
    assert parse_groups(("attn", "cross_attn")) == ("self_attn", "cross_attn")
    assert parse_groups(("text", "ff")) == ("ff", "text")
    assert parse_groups(("all",)) == ("self_attn", "cross_attn", "ff", "conv", "text", "other")


def test_rows_are_named_as_in_the_index(tmp_path: Path) -> None:
    paths = [
        lora(tmp_path / "a.safetensors", 0),
        lora(tmp_path / "b.safetensors", 1, LINEAR[:2]),
        lora(tmp_path / "c.safetensors", 2),
    ]
    again = [*paths, paths[1]]
    opened = open_feature("style", again)
    assert opened.rows == [0, 1, 2, 3] and opened.layouts.tolist() == [0, 1, 0, 1]
    with Store.open(tmp_path / "i.db", "write") as store:
        build(store, paths, device="cpu", relate=False)
        rows = dict(
            store.conn.execute(
                "SELECT l.content, y.digest FROM loras l JOIN layouts y ON y.id = l.layout"
            ).fetchall()
        )
    assert rows == {
        content: opened.digests[layout]
        for content, layout in zip(opened.contents, opened.layouts.tolist(), strict=True)
    }


def test_an_alpha_outside_of_the_tensors_is_in_the_content(tmp_path: Path) -> None:
    """Two PEFT files with equal tensors and another lora_alpha are not one content."""
    stem = "base_model.model.unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(2, 1280),
        f"{stem}.lora_B.weight": torch.randn(1280, 2),
    }
    paths = []
    for alpha in (2, 6):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(f'{{"r": 2, "lora_alpha": {alpha}}}')
        paths.append(write(folder / "adapter_model.safetensors", tensors))
    opened = open_feature("delta exact", paths)
    assert len(set(opened.contents)) == 2
    gram = opened.matrix.gram(opened.matrix.groups[0])
    np.testing.assert_allclose(gram, gram[0, 0] * np.array([[1, 3], [3, 9]]), rtol=1e-5)


def test_pickles_when_allowed(tmp_path: Path) -> None:
    tensors = make("lora", 0, LINEAR)[0]
    torch.save(tensors, tmp_path / "a.pt")
    paths = [tmp_path / "a.pt", write(tmp_path / "a.safetensors", tensors)]
    for feature in ("style", "delta", "canonical", "delta exact"):
        opened = open_feature(feature, paths, allow_pickle=True)
        assert opened.rows == [0, 1] and opened.contents[0] == opened.contents[1]
        one, two = opened.matrix.columns("ff", slice(0, 500))
        np.testing.assert_array_equal(one, two)
    assert open_feature("theta", paths, allow_pickle=True, pad=True).rows == [1]


# ---------------------------------------------------------------------------- components


@pytest.mark.parametrize(
    ("feature", "world", "groups"),
    [
        ("theta", "fixed", ("ff",)),
        ("style", "thin", ("self", "cross")),
        ("canonical", "thin", ()),
        ("delta exact", "fixed", ("cross",)),
    ],
)
def test_components_are_those_of_scikit_learn(
    shared: Path, feature: str, world: str, groups: tuple[str, ...]
) -> None:
    """From two passes over the files; d from 10,528 to 72,704."""
    paths = sorted((shared / "loras/fontbench" / world).glob("*-train-*.safetensors"))[:40]
    opened = open_feature(feature, paths, groups)
    matrix = opened.matrix
    products = Kernel({g: matrix.gram(g) for g in matrix.groups}, matrix.present)
    ones = dict.fromkeys(matrix.groups, 1.0)
    fitted = kernel.fit(products, opened.layouts, np.ones(40), ones, most=8)
    whole = {g: matrix.columns(g, slice(0, matrix.widths[g])) for g in matrix.groups}
    v = np.concatenate([fitted.mix[g] @ whole[g] for g in matrix.groups], 1)
    x = np.concatenate([whole[g] for g in matrix.groups], 1).astype(np.float64)
    pca = PCA(8, svd_solver="full").fit(x)
    assert subspace_angles(v.T, pca.components_.T).max() < 1e-3
    np.testing.assert_allclose(fitted.eigenvalues[:8] / 39, pca.explained_variance_, rtol=1e-4)


# ---------------------------------------------------------------------------- figures

#: World → feature → mAP (same, diff) over the whole ranking, from the README of the collections.
FIGURES = {
    "fixed": {
        "theta": (79.8, 73.4),
        "delta exact": (81.8, 77.8),
        "style exact": (92.4, 80.7),
        "style": (91.1, 79.3),
    },
    "wild": {
        "theta": (11.7, 8.9),
        "delta exact": (60.4, 54.9),
        "style exact": (73.3, 65.9),
        "style": (71.7, 64.9),
    },
    "thin": {
        "theta": (16.7, 17.3),
        "delta exact": (60.9, 59.0),
        "style exact": (73.8, 64.6),
        "style": (69.8, 58.7),
    },
}
QUICK = {("fixed", "theta"), ("thin", "style exact"), ("thin", "style")}


@pytest.mark.parametrize(
    ("world", "feature"),
    [
        pytest.param(w, f, marks=() if (w, f) in QUICK else pytest.mark.slow)
        for w, own in FIGURES.items()
        for f in own
    ],
)
def test_retrieval_without_a_basis_is_as_in_the_reference(
    shared: Path, world: str, feature: str
) -> None:
    """Cosines; style with every group at unit length and cross-attention at half weight.

    The reference knows the factors before alpha was folded into some of the files, which moves
    plain θ by up to 0.9 points where alphas differ.
    """
    folder = shared / "loras/fontbench" / world
    with (folder / "labels.csv").open(newline="") as file:
        labels = [row for row in csv.DictReader(file) if row["split"][:4] in ("trai", "test")]
    opened = open_feature(feature, [folder / row["file"] for row in labels], pad=True)
    assert opened.rows == list(range(len(labels))) and not opened.refused
    matrix = opened.matrix
    products = Kernel({g: matrix.gram(g) for g in matrix.groups}, matrix.present)
    if feature.startswith("style"):
        half = {"self_attn": 1.0, "cross_attn": 0.5, "ff": 1.0}
        unit = products.unit().grams
        joined = np.sum([half[g] * unit[g] for g in matrix.groups], 0)
    else:
        joined = np.sum(list(products.grams.values()), 0)
    cosines = Kernel({"all": joined}, {}).unit().grams["all"]
    artist = np.array([row["artist"] for row in labels])
    split = np.array([row["split"] for row in labels])
    base = split == "train"
    for query, expected in zip(("same", "diff"), FIGURES[world][feature], strict=True):
        found = [
            average_precision_score(artist[base] == artist[i], cosines[i, base])
            for i in np.flatnonzero(split == f"test_{query}")
        ]
        near = 3.0 if feature == "style" else 1.0
        assert 100 * np.mean(found) == pytest.approx(expected, abs=near)
