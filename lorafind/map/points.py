"""Coordinates: the LoRAs of an architecture in two and three dimensions.

They stand on the embeddings of the basis in use (DESIGN 4): its first components, as in the paper's
figures, or a nonlinear picture of all components (t-SNE, UMAP). A map shows less than the
embeddings hold: neighbours come from those (:mod:`lorafind.map.nearest`), never from the picture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from lorafind.bases.basis import Basis
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import current
from lorafind.index.classes import kinds
from lorafind.index.opening import snapshot
from lorafind.index.store import Store

COMPONENTS, TSNE, UMAP = "components", "tsne", "umap"
METHODS = (COMPONENTS, TSNE, UMAP)
#: Names of coordinates, for people.
AXES = {COMPONENTS: "component", TSNE: "t-SNE", UMAP: "UMAP"}
#: A page with more points is no longer handled smoothly by a browser.
MOST = 50_000
#: Points that t-SNE and UMAP need at the least.
FEWEST = 5
PERPLEXITY = 30.0


@dataclass(frozen=True)
class Embedded:
    """n LoRAs in a basis of k components.

    ids: n int64, rising. vectors: n × k float32, over each one's own groups. groups: n bit masks.
    parts: n × width float32 (:meth:`lorafind.bases.basis.Basis.parts`). seen: n bools, which were
    fitted. left_out: how many more there are than a map shows; empty: how many have no group of the
    basis (text encoders alone), and so no place.
    """

    basis: Basis
    ids: np.ndarray
    vectors: np.ndarray
    groups: np.ndarray
    parts: np.ndarray
    seen: np.ndarray
    left_out: int = 0
    empty: int = 0


def largest(store: Store) -> str:
    """The architecture of most LoRAs, by name where two have as many; BasisProblem for none."""
    count: Counter[str] = Counter()
    for architecture, number in store.conn.execute(
        "SELECT architecture, count(*) FROM loras l WHERE EXISTS (SELECT 1 FROM files f WHERE "
        "f.lora = l.id AND f.presence != 'gone') GROUP BY architecture"
    ):
        for name in kinds(architecture):
            count[name] += number
    if not count:
        raise BasisProblem("The index holds no LoRA: run `lorafind index FOLDER` first.")
    return min(count, key=lambda name: (-count[name], name))


def _missing(store: Store, architecture: str, basis: str) -> BasisProblem:
    """Why there is no basis to place the LoRAs in."""
    there = sorted(
        {
            kind
            for (name,) in store.conn.execute("SELECT DISTINCT architecture FROM loras")
            for kind in kinds(name)
        }
    )
    if architecture not in there:
        return BasisProblem(
            f"The index holds no LoRA of {architecture!r}; there is {', '.join(there)}."
        )
    if basis:
        return BasisProblem(
            f"The index has no basis {basis!r} for {architecture}: `lorafind basis list` shows "
            "those that there are."
        )
    return BasisProblem(
        f"There is no basis for {architecture} yet, which the places of a map come from: a "
        "collection has one of its own from 30 unrelated LoRAs on, and `lorafind basis use` takes "
        "a published one."
    )


def gather(store: Store, architecture: str, basis: str = "", most: int = MOST) -> Embedded:
    """The embeddings of every LoRA of an architecture that still has a file.

    basis: id or name of one of the index, ``own``; empty: the one in use. most: of more, an even
    choice. Raises BasisProblem where there is no such basis, or it has fewer than two LoRAs.
    """
    with snapshot(store.conn):
        found = current(store, architecture, light=True, wanted=basis)
        if found is None or "model" not in found.spaces:
            raise _missing(store, architecture, basis)
        there = [
            lora
            for (lora,) in store.conn.execute(
                "SELECT DISTINCT lora FROM files WHERE lora IS NOT NULL AND presence != 'gone'"
            )
        ]
        known, empty = _members(store, found.id, np.array(there, np.int64))
        chosen = known
        if len(known) > most:
            chosen = known[np.linspace(0, len(known) - 1, most).astype(int)]
        if len(chosen) < 2:
            raise BasisProblem(
                f"{architecture} has {len(chosen)} LoRA in the basis {found.id}: a map needs two."
            )
        rows = _rows(store, found, chosen)
    return Embedded(found, chosen, *rows, left_out=len(known) - len(chosen), empty=empty)


def _members(store: Store, basis: str, there: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids that are embedded and there, rising; how many of these have no vector."""
    found, empty = [np.empty(0, np.int64)], 0
    for ids, rows in store.chunks.scan("embedding", basis):
        placed = rows["vector"].any(1) if rows["vector"].shape[1] else np.zeros(len(rows), bool)
        here = np.isin(ids, there)
        empty += int((here & ~placed).sum())
        found.append(ids[here & placed].astype(np.int64))
    return np.sort(np.concatenate(found)), empty


def _rows(
    store: Store, basis: Basis, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(vectors, groups, parts, seen) in the order of ``ids``."""
    size = basis.record["vector"].shape[0]
    vectors = np.zeros((len(ids), size), np.float32)
    groups = np.zeros(len(ids), np.uint8)
    seen = np.zeros(len(ids), bool)
    parts = np.zeros((len(ids), basis.width), np.float32)
    for block, rows in store.chunks.scan("embedding", basis.id):
        picked = np.isin(block, ids)
        where = np.searchsorted(ids, block[picked])
        vectors[where], groups[where] = rows["vector"][picked], rows["groups"][picked]
        if "seen" in (rows.dtype.names or ()):
            seen[where] = rows["seen"][picked] != 0
    for block, rows in store.chunks.scan("parts", basis.id):
        picked = np.isin(block, ids)
        parts[np.searchsorted(ids, block[picked])] = rows[picked]
    return vectors, groups, parts, seen


def place(vectors: np.ndarray, method: str = COMPONENTS, dimensions: int = 2) -> np.ndarray:
    """n × dimensions float64; the same numbers at every run.

    ``components``: the first columns, as in the paper (a basis of fewer is filled up with zeros).
    ``tsne``, ``umap``: of all columns, by Euclidean distance, which for vectors of length 1 is the
    order of their cosines. Raises BasisProblem for fewer than FEWEST points of the latter two or
    where umap-learn is missing, ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is no way to place points; choose from {', '.join(METHODS)}")
    if method == COMPONENTS:
        made = np.zeros((len(vectors), dimensions))
        taken = min(dimensions, vectors.shape[1])
        made[:, :taken] = vectors[:, :taken]
        return made
    if len(vectors) < FEWEST:
        raise BasisProblem(f"{method} needs {FEWEST} LoRAs or more: leave out --layout.")
    if method == TSNE:
        from sklearn.manifold import TSNE as Tsne

        perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
        # Nothing random remains: PCA starts it.
        start = "pca" if vectors.shape[1] >= dimensions else "random"
        made = Tsne(dimensions, perplexity=perplexity, init=start, random_state=0).fit_transform(
            vectors.astype(np.float64)
        )
        return np.asarray(made, np.float64)
    try:
        umap = import_module("umap")
    except ModuleNotFoundError as error:
        raise BasisProblem(
            "UMAP needs umap-learn, which is missing: pip install 'lorafind[umap]', or take "
            "--layout tsne."
        ) from error
    near = min(15, len(vectors) - 1)
    start = "spectral" if len(vectors) > dimensions + 2 else "random"
    made = umap.UMAP(
        n_components=dimensions, n_neighbors=near, init=start, random_state=0, n_jobs=1
    ).fit_transform(vectors)
    return np.asarray(made, np.float64)
