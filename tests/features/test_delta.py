"""Exact features against dense float64 matrices written from the definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafind.bases.problem import BasisProblem
from lorafind.features import delta
from lorafind.features.delta import Exact
from lorafind.features.opening import open_feature
from lorafind.index.progress import Silent
from tests.search.made_files import LAYERS, make, write

UNET = [name for name in LAYERS if name.startswith("unet")]
#: Several ranks, families and layouts; the last three have no low rank.
KINDS = (
    ("lora", 3, UNET),
    ("lora", 40, UNET),
    ("lora", 8, UNET[:4]),
    ("lora", 1, UNET),
    ("loha", 3, [name for name in UNET if "resnets" not in name]),
    ("full", 1, UNET[:3]),
    ("full", 1, UNET),
    ("lokr", 3, [name for name in UNET if "resnets" not in name]),
)

Made = tuple[list[Path], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Files, and their dense ΔW in float64 by canonical name."""
    folder = tmp_path_factory.mktemp("exact")
    paths, dense = [], []
    for k, (family, rank, names) in enumerate(KINDS):
        tensors, x = make(family, k, names, rank)
        paths.append(write(folder / f"{k}.safetensors", tensors))
        dense.append(x)
    return paths, dense


def in_order(group: str) -> list[str]:
    return sorted(name for name in UNET if LAYERS[name][1] == group)


def delta_rows(dense: list[dict[str, Tensor]], group: str) -> np.ndarray:
    """ΔW end to end, n × d float64."""
    return np.array(
        [
            np.concatenate(
                [
                    x[name].numpy().ravel() if name in x else np.zeros(np.prod(LAYERS[name][3]))
                    for name in in_order(group)
                ]
            )
            for x in dense
        ]
    )


def style_rows(dense: list[dict[str, Tensor]], group: str) -> np.ndarray:
    """Unit ΔW, or unit K₀, times the vote of its layer."""
    found = []
    for x in dense:
        own = {n: x[n].numpy() for n in in_order(group) if n in x}
        norms = {n: np.linalg.norm(d) for n, d in own.items()}
        # The lower one of two in the middle.
        middle = sorted(norms.values())[(len(norms) - 1) // 2] if norms else 1.0
        blocks = []
        for name in in_order(group):
            o, i = LAYERS[name][3]
            width = o if group == "cross_attn" else i
            if name not in own:
                blocks.append(np.zeros(o * width))
                continue
            y = own[name]
            if group == "cross_attn":
                y = y @ y.T
                y = y - np.eye(o) * np.trace(y) / o
            vote = min(1.0, norms[name] / (0.01 * middle))
            blocks.append((vote * y / np.linalg.norm(y)).ravel())
        found.append(np.concatenate(blocks))
    return np.array(found)


def close(gram: np.ndarray, rows: np.ndarray, share: float = 1e-6) -> None:
    """Within a share of the product of norms."""
    expected = rows @ rows.T
    size = np.linalg.norm(rows, axis=1)
    bound = share * np.outer(size, size)
    assert (np.abs(gram - expected) <= bound + 1e-300).all(), (gram - expected) / (bound + 1e-300)


@pytest.mark.parametrize("group", ["self_attn", "cross_attn", "ff", "conv"])
@pytest.mark.parametrize("way", ["chosen", "factors", "rows", "again"])
def test_products_are_those_of_the_dense_matrices(
    made: Made, group: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way: by factors, by rows, and where next to nothing stays in memory."""
    paths, dense = made
    if way in ("factors", "rows"):
        monkeypatch.setattr(delta._Module, "dense", lambda module: way == "rows")
    if way == "factors":
        monkeypatch.setattr(delta, "COLUMNS", 50)
    if way == "rows":
        monkeypatch.setattr("lorafind.features.matrix.TILE", 100_000)
    if way == "again":
        monkeypatch.setattr(delta, "HELD", 10_000)
    exact = open_feature("delta exact", paths).matrix
    close(exact.gram(group), delta_rows(dense, group))
    assert exact.present[group].tolist() == delta_rows(dense, group).any(1).tolist()
    style = open_feature("style exact", paths).matrix
    close(style.gram(group), style_rows(dense, group))


@pytest.mark.parametrize("group", ["self_attn", "cross_attn", "ff"])
def test_columns_are_those_of_the_dense_matrices(made: Made, group: str) -> None:
    paths, dense = made
    for feature, rows in (
        ("delta exact", delta_rows(dense, group)),
        ("style exact", style_rows(dense, group)),
    ):
        matrix = open_feature(feature, paths).matrix
        assert matrix.widths[group] == rows.shape[1]
        edge = rows.shape[1] // len(in_order(group))
        for start, stop in ((0, 700), (edge - 333, min(edge + 1000, rows.shape[1]))):
            np.testing.assert_allclose(
                matrix.columns(group, slice(start, stop)),
                rows[:, start:stop],
                atol=3e-6 * np.abs(rows).max(),
            )


def test_the_gram_of_the_tiles_is_the_same(made: Made) -> None:
    paths, dense = made
    matrix = open_feature("style exact", paths[:5], ["cross"]).matrix
    close(super(Exact, matrix).gram("cross_attn"), style_rows(dense[:5], "cross_attn"))  # type: ignore[misc]


@pytest.mark.parametrize("attn", ["attn1", "attn2"])
def test_a_faint_layer_has_a_faint_vote(tmp_path: Path, attn: str) -> None:
    stem = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{attn}_to_"
    paths, rows = [], []
    for k in range(3):
        g = torch.Generator().manual_seed(k)
        tensors, blocks = {}, []
        for leaf in ("k", "q", "v"):
            n = 768 if attn == "attn2" and leaf != "q" else 1280
            # The second file's q is a thousandth of the others: a tenth of a hundredth.
            up, down = torch.randn(1280, 2, generator=g), torch.eye(2, n)
            up *= (1e-3 if (k, leaf) == (1, "q") else 1.0) / up.norm()
            tensors[f"{stem}{leaf}.lora_up.weight"] = up
            tensors[f"{stem}{leaf}.lora_down.weight"] = down
            x = up.double().numpy() @ down.double().numpy()
            y = x @ x.T - np.eye(1280) * (x**2).sum() / 1280 if attn == "attn2" else x
            vote = 0.1 if (k, leaf) == (1, "q") else 1.0
            blocks.append((vote * y / np.linalg.norm(y)).ravel())
        paths.append(write(tmp_path / f"{k}.safetensors", tensors))
        rows.append(np.concatenate(blocks))
    matrix = open_feature("style exact", paths).matrix
    close(matrix.gram(matrix.groups[0]), np.array(rows))


def test_every_factor_is_read_once(made: Made) -> None:
    paths, _ = made
    matrix = open_feature("delta exact", paths[:4]).matrix
    assert isinstance(matrix, Exact)
    # One alpha of four bytes per layer beside the factors.
    payload = sum(
        4 + 4 * rank * sum(LAYERS[name][3]) for _, rank, names in KINDS[:4] for name in names
    )
    before = matrix.adapters.read_bytes
    for group in matrix.groups:
        matrix.gram(group)
    assert matrix.adapters.read_bytes - before == payload


class Kept:
    """Interrupts after some saves, and gives back what was kept."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.state: tuple[int, np.ndarray] | None = None
        self.last = False

    def load(self, group: str) -> tuple[int, np.ndarray] | None:
        return self.state

    def save(self, group: str, done: int, total: np.ndarray, last: bool) -> None:
        self.state, self.last = (done, total.copy()), last
        if done == self.stop:
            raise KeyboardInterrupt


class Told(Silent):
    """Adds up what is told."""

    def __init__(self) -> None:
        self.tiles = 0

    def stage(self, title: str, files: int, size: int) -> None:
        raise AssertionError

    def advance(self, files: int, size: int) -> None:
        self.tiles += files


def test_an_interrupted_gram_goes_on(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, dense = made
    matrix = open_feature("delta exact", paths[:4]).matrix
    monkeypatch.setattr("lorafind.features.matrix.TILE", 4 * 4 * 30_000)
    kept = Kept(1)
    with pytest.raises(KeyboardInterrupt):
        matrix.gram("self_attn", saved=kept)
    kept.stop = -1
    told = Told()
    close(matrix.gram("self_attn", watch=told, saved=kept), delta_rows(dense[:4], "self_attn"))
    assert kept.last and kept.state is not None and kept.state[0] == 2
    # However far it had come, all tiles are told of.
    assert told.tiles == len(matrix.tiles("self_attn"))


def test_biases_count_as_change_and_not_as_style(tmp_path: Path) -> None:
    paths, dense, bias = [], [], []
    for k in range(2):
        tensors, x = make("full", k, UNET[:1])
        g = torch.Generator().manual_seed(k)
        # Of a layer beside: a bias is in the group of what is neither attention nor feed-forward.
        bias.append(torch.randn(320, generator=g))
        tensors["lora_unet_down_blocks_0_attentions_0_proj_in.diff_b"] = bias[-1]
        paths.append(write(tmp_path / f"{k}.safetensors", tensors))
        dense.append(x)
    change = open_feature("delta exact", paths).matrix
    assert change.groups == ("self_attn", "other")
    close(change.gram("other"), torch.stack(bias).double().numpy())
    assert open_feature("style exact", paths).matrix.groups == ("self_attn",)


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{k}.safetensors", make("lora", k, UNET[:1])[0]) for k in range(2)]
    matrix = open_feature("delta exact", paths).matrix
    paths[1].unlink()
    with pytest.raises(BasisProblem, match=r"1\.safetensors is no longer there"):
        matrix.gram("self_attn")
