"""Sketched features against the index and against dense sketches written from the formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafind.features import sketches
from lorafind.features.opening import open_feature
from lorafind.formats.groups import GROUPS
from lorafind.index.build import build
from lorafind.index.store import Store
from tests.search.made_files import LAYERS, make, write
from tests.signatures import dense as formulas

UNET = [name for name in LAYERS if name.startswith("unet")]
KINDS = (("lora", 3, UNET), ("lora", 150, UNET[:5]), ("lora", 4, UNET[:2]), ("full", 1, UNET[:4]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Files, and their dense ΔW in float64 by canonical name."""
    folder = tmp_path_factory.mktemp("sketched")
    paths, dense = [], []
    for k, (family, rank, names) in enumerate(KINDS):
        tensors, x = make(family, k, names, rank)
        paths.append(write(folder / f"{k}.safetensors", tensors))
        dense.append(x)
    return paths, dense


def test_files_give_what_the_index_has(
    made: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    paths, _ = made
    opened = open_feature("style", paths)
    with Store.open(tmp_path / "i.db", "write") as store:
        build(store, paths, device="cpu", relate=False)
        ids = dict(store.conn.execute("SELECT content, id FROM loras").fetchall())
        layouts = {digest for (digest,) in store.conn.execute("SELECT digest FROM layouts")}
        wanted = [ids[content] for content in opened.contents]
        stored = sketches.from_store(store, wanted, GROUPS)
        some = sketches.from_store(store, wanted[::-1][:2], ("ff", "self_attn"))
    assert set(opened.digests) == layouts
    assert stored.groups == opened.matrix.groups == ("self_attn", "cross_attn", "ff", "conv")
    assert stored.fingerprint == opened.matrix.fingerprint
    for group in stored.groups:
        rows = opened.matrix.columns(group, slice(0, 32_768))
        np.testing.assert_array_equal(stored.columns(group, slice(0, 32_768)), rows)
        has = [any(LAYERS[n][1] == group for n in names) for _, _, names in KINDS]
        assert opened.matrix.present[group].tolist() == stored.present[group].tolist() == has
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), np.array(has, float), atol=1e-6)
        wide = rows.astype(np.float64)
        np.testing.assert_allclose(stored.gram(group), wide @ wide.T, atol=1e-6)
    # The last two files are without feed-forward.
    assert some.groups == ("self_attn",) and some.count == 2
    np.testing.assert_array_equal(
        some.columns("self_attn", slice(5, 9)),
        stored.columns("self_attn", slice(5, 9))[::-1][:2],
    )


@pytest.mark.parametrize("group", ["self_attn", "cross_attn", "ff", "conv"])
def test_the_sketch_of_the_change_is_that_of_the_formula(
    made: tuple[list[Path], list[dict[str, Tensor]]], group: str
) -> None:
    paths, dense = made
    matrix = open_feature("delta", paths).matrix
    rows = matrix.columns(group, slice(0, 32_768))
    exact = np.zeros((len(dense), len(dense)))
    for i, x in enumerate(dense):
        own = [name for name in x if LAYERS[name][1] == group]
        if not own:
            assert not rows[i].any() and not matrix.present[group][i]
            continue
        grid = np.sum([formulas.grid(name, x[name].numpy()) for name in own], 0)
        expected = formulas.style_fold(grid)
        # Half a step of int8, and the float16 of what is kept as a grid.
        step = np.abs(expected).max() / 127
        np.testing.assert_allclose(rows[i], expected, atol=0.56 * step)
        for j, y in enumerate(dense):
            exact[i, j] = sum(float((x[n] * y[n]).sum()) for n in own if n in y)
    gram = matrix.gram(group)
    size = np.sqrt(np.diag(exact))
    # Products of the changes themselves, with the spread of a sketch of rank-poor layers.
    assert (np.abs(gram - exact) <= 0.15 * np.outer(size, size)).all()


def test_the_sketch_of_the_change_is_linear(tmp_path: Path) -> None:
    """Twice the change is twice the row, which style does not see."""
    tensors = make("lora", 1, UNET)[0]
    paths = [write(tmp_path / "1.safetensors", tensors)]
    doubled = {k: t * 2 if k.endswith("alpha") else t for k, t in tensors.items()}
    paths.append(write(tmp_path / "2.safetensors", doubled))
    for feature, factor in (("delta", 2.0), ("style", 1.0)):
        matrix = open_feature(feature, paths).matrix
        for group in matrix.groups:
            one, two = matrix.columns(group, slice(0, 32_768))
            np.testing.assert_allclose(two, factor * one, rtol=1e-3, atol=1e-6)


def test_text_encoders_are_there_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", make("lora", 0)[0])
    assert "text" not in open_feature("style", [path]).matrix.groups
    matrix = open_feature("style", [path], ["text", "ff"]).matrix
    assert matrix.groups == ("ff", "text")


def test_lengths_of_rows_beyond_a_block() -> None:
    rng = np.random.default_rng(0)
    styles = rng.integers(-127, 128, (600, 40)).astype(np.int8)
    styles[300] = 0
    lengths = rng.uniform(1.0, 5.0, 600)
    matrix = sketches.Sketches(
        "delta", {"ff": styles}, {"ff": lengths}, [str(k) for k in range(600)]
    )
    found = np.linalg.norm(matrix.columns("ff", slice(0, 40)), axis=1)
    lengths[300] = 0.0
    np.testing.assert_allclose(found, lengths, rtol=1e-5)
    assert not matrix.present["ff"][300] and matrix.present["ff"].sum() == 599
    assert torch.from_numpy(matrix.columns("ff", slice(3, 7))).shape == (600, 4)
