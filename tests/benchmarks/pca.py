"""Principal components from two passes over tiles, against scikit-learn on the same matrix.

Every way runs in a process of its own (``python -m tests.benchmarks.pca WAY FOLDER N D``), so that
its peak memory is its own. All read the matrix from one file; ``incremental`` and ``gram`` in
pieces. The time is that of the fit, reading included, imports not.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafind.bases import kernel
from lorafind.features.matrix import Matrix

if TYPE_CHECKING:
    from tests.benchmarks.__main__ import Line

#: Components, as many as the paper computes; artists, so that they stand out from the noise.
COMPONENTS = 100
ARTISTS = 101
#: θ of an SD1.5 LoRA at rank 16, and the paper's LoRAs: 63 artists × 24.
THETA = {"self_attn": 1_597_440, "cross_attn": 1_591_296, "ff": 2_795_520}
PAPER = (63, 24)


class OnDisk(Matrix):
    """A float32 matrix in a raw file, row by row."""

    def __init__(self, path: Path, rows: int, columns: int) -> None:
        self.feature, self.groups, self.fingerprint = "theta", ("ff",), path.name
        self.count, self.widths = rows, {"ff": columns}
        self.present = {"ff": np.ones(rows, bool)}
        self.path, self.read_bytes = path, 0

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """n × c float32, by one positional read per row."""
        out = np.empty((self.count, tile.stop - tile.start), np.float32)
        with self.path.open("rb", buffering=0) as file:
            for i, row in enumerate(out):
                file.seek(4 * (i * self.widths[group] + tile.start))
                file.readinto(row)
        self.read_bytes += out.nbytes
        return out


class Generated(Matrix):
    """θ of LoRAs that are made when they are asked for, by generators that count from the tile.

    Every artist adds a direction of its own to one start that all share, every LoRA its noise.
    """

    def __init__(self, artists: int, each: int, widths: dict[str, int]) -> None:
        self.feature, self.fingerprint = "theta", f"made {artists} {each} {widths}"
        self.groups, self.widths = tuple(widths), widths
        self.count, self.artists, self.each = artists * each, artists, each
        self.present = {g: np.ones(self.count, bool) for g in widths}
        self.served = 0

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """The same numbers at every call."""
        width = tile.stop - tile.start
        key = [self.groups.index(group), tile.start]
        rng = np.random.Generator(np.random.Philox(key=key))
        start = rng.random(width, np.float32)
        directions = rng.random((self.artists, width), np.float32) * 0.5 + start
        out = np.empty((self.count, width), np.float32)
        rng.random(dtype=np.float32, out=out)
        for artist, direction in enumerate(directions):
            out[artist * self.each : (artist + 1) * self.each] += direction
        self.served += out.nbytes
        return out


def write(path: Path, rows: int, columns: int) -> None:
    """A matrix with ARTISTS means and noise, as raw float32."""
    rng = np.random.default_rng(rows)
    means = rng.standard_normal((ARTISTS, columns), np.float32)
    with path.open("wb") as file:
        for i in range(rows):
            row = rng.standard_normal(columns, np.float32)
            row += means[i % ARTISTS]
            file.write(row.data)


# ---------------------------------------------------------------------------- the ways


def gram(path: Path, rows: int, columns: int) -> np.ndarray:
    """This package: inner products tile by tile, then the components tile by tile."""
    from lorafind.bases.rebuild import inner_products
    from lorafind.index.progress import Silent

    matrix = OnDisk(path, rows, columns)
    products = inner_products(matrix, "cpu", Silent())
    everywhere = np.zeros(rows, int)
    fitted = kernel.fit(products, everywhere, np.ones(rows), {"ff": 1.0}, most=COMPONENTS)
    mix = fitted.mix["ff"].astype(np.float32)
    found = np.empty((len(mix), columns), np.float32)
    for tile, block in matrix.walk("ff"):
        found[:, tile] = mix @ block
    assert matrix.read_bytes == 2 * 4 * rows * columns
    return found


def plain(path: Path, rows: int, columns: int) -> np.ndarray:
    """The same mathematics with the whole matrix in memory."""
    x = _whole(path, rows, columns)
    x -= x.mean(0)
    values, vectors = np.linalg.eigh((x @ x.T).astype(np.float64))
    kept = slice(-1, -COMPONENTS - 1, -1)
    return (vectors[:, kept] / np.sqrt(values[kept])).T.astype(np.float32) @ x


def full(path: Path, rows: int, columns: int) -> np.ndarray:
    """scikit-learn's exact decomposition."""
    from sklearn.decomposition import PCA

    return PCA(COMPONENTS, svd_solver="full").fit(_whole(path, rows, columns)).components_


def randomized(path: Path, rows: int, columns: int) -> np.ndarray:
    """scikit-learn's approximation."""
    from sklearn.decomposition import PCA

    pca = PCA(COMPONENTS, svd_solver="randomized", random_state=0)
    return pca.fit(_whole(path, rows, columns)).components_


def incremental(path: Path, rows: int, columns: int) -> np.ndarray:
    """scikit-learn's approximation in one pass over pieces of the rows."""
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(COMPONENTS)
    step = 2 * COMPONENTS
    # A rest of fewer rows joins the piece before it: one must have more rows than components.
    edges = [*range(0, rows - step + 1, step), rows]
    with path.open("rb") as file:
        for start, stop in pairwise(edges):
            piece = np.fromfile(file, np.float32, (stop - start) * columns)
            pca.partial_fit(piece.reshape(-1, columns))
    return pca.components_


WAYS = {f.__name__: f for f in (gram, plain, full, randomized, incremental)}


def _whole(path: Path, rows: int, columns: int) -> np.ndarray:
    return np.fromfile(path, np.float32).reshape(rows, columns)


def theta(folder: Path, scale: float) -> dict[str, float]:
    """`rebuild-basis` over θ of the paper's LoRAs; returns seconds and bytes."""
    from lorafind.bases.judge import Material, Settings
    from lorafind.bases.rebuild import rebuild

    artists, each = PAPER
    widths = {group: int(width * scale) for group, width in THETA.items()}
    matrix = Generated(artists, max(1, int(each * scale)), widths)
    n = matrix.count
    material = Material(
        matrix,
        "sd1",
        None,
        np.zeros(n, int),
        ["0" * 64],
        [f"{k:064x}" for k in range(n)],
        np.ones(n),
    )
    began = time.perf_counter()
    settings = Settings("made", min(COMPONENTS, n - 1))
    rebuild(material, folder / "theta.safetensors", settings)
    took = time.perf_counter() - began
    size = (folder / "theta.safetensors").stat().st_size
    whole = 4 * n * sum(widths.values())
    passes = matrix.served / whole
    return {"seconds": took, "passes": passes, "basis": size, "n": n, "whole": whole}


# ---------------------------------------------------------------------------- the table


def pca(place: Path, scale: float) -> Iterator[Line]:
    """Time and peak memory of principal components at N = 500, 1,500 and 5,000."""
    from scipy.linalg import subspace_angles

    from tests.benchmarks.__main__ import Line

    columns = max(2000, int(20_000 * scale))
    for rows in (500, 1500, 5000):
        rows = max(3 * COMPONENTS, int(rows * scale))
        write(place / "x", rows, columns)
        told: dict[str, tuple[float, int]] = {}
        for way in WAYS:
            told[way] = _run(place, way, str(rows), str(columns))
        mine = np.load(place / "gram.npy")
        size = 4 * rows * columns / 2**20
        took, peak = told["gram"]
        what = f"PCA, {COMPONENTS} components of {rows:,} × {columns:,} ({size:,.0f} MiB)"
        yield Line(what, f"{took:.2f} s", "")
        yield Line("… peak memory of the process", f"{peak / 2**20:,.0f} MiB", "")
        for way, (other, most) in told.items():
            if way == "gram":
                continue
            name = "the whole matrix's Gram" if way == "plain" else f"scikit-learn {way}"
            yield Line(f"… time / {name}", f"{took / other:.2f}", "≤ 1.0" if way == "full" else "")
            yield Line(f"… peak memory / {name}", f"{peak / most:.2f}", "")
        for way in ("full", "randomized", "incremental"):
            angle = subspace_angles(mine.T, np.load(place / f"{way}.npy").T).max()
            goal = "< 1e-3" if way == "full" else ""
            yield Line(f"… largest principal angle to scikit-learn {way}", f"{angle:.1e}", goal)


def paper(place: Path, scale: float) -> Iterator[Line]:
    """`rebuild-basis` over 1,512 θ of 5,984,256 numbers each."""
    from tests.benchmarks.__main__ import Line

    _, peak = _run(place, "theta", str(scale), "0")
    told = json.loads((place / "theta.json").read_text())
    what = f"basis of θ: {told['n']:,} LoRAs × {told['whole'] // (4 * told['n']):,} numbers"
    yield Line(f"{what} ({told['whole'] / 2**30:,.1f} GiB)", f"{told['seconds']:,.0f} s", "")
    yield Line("… peak memory of the process", f"{peak / 2**20:,.0f} MiB", "< 2048 MiB")
    yield Line("… bytes read / bytes of all θ", f"{told['passes']:.2f}", "2.00")
    yield Line("… the basis file", f"{told['basis'] / 2**20:,.0f} MiB", "")


def _run(place: Path, way: str, first: str, second: str) -> tuple[float, int]:
    """(seconds of the fit, peak bytes of the process)."""
    from tests.benchmarks.__main__ import process

    command = (sys.executable, "-m", "tests.benchmarks.pca", way, str(place), first, second)
    _, peak = process(*command, repeat=0)
    return float(json.loads((place / f"{way}.json").read_text())["seconds"]), peak


def main(way: str, folder: str, first: str, second: str) -> None:
    """Run one way and leave its seconds and components in the folder."""
    place = Path(folder)
    if way == "theta":
        told = theta(place, float(first))
    else:
        began = time.perf_counter()
        found = WAYS[way](place / "x", int(first), int(second))
        told = {"seconds": time.perf_counter() - began}
        np.save(place / f"{way}.npy", found)
    (place / f"{way}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
