"""Material for a basis: from a labelled folder, or from what the index keeps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorafind.bases.collection import SAMPLE
from lorafind.bases.judge import Material
from lorafind.bases.labels import Labelled, read_labels, with_splits
from lorafind.bases.problem import BasisProblem
from lorafind.bases.stored import members
from lorafind.features.opening import open_feature, parse_groups
from lorafind.features.sketches import from_store
from lorafind.features.sources import Refusal
from lorafind.index.classes import kinds
from lorafind.index.progress import Progress, Silent
from lorafind.index.store import Store

#: LoRAs of each other split that are looked at.
HELD = 512


@dataclass(frozen=True)
class Wanted:
    """feature: one of ``FEATURES`` of ``features/opening.py``; groups: words, none for the U-Net or
    transformer; architecture: empty for the most frequent; seed: of splits where none are named."""

    feature: str = "style"
    groups: Sequence[str] = ()
    architecture: str = ""
    seed: int = 0


def from_folder(
    folder: Path,
    wanted: Wanted,
    labels: Path | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
    watch: Progress | None = None,
) -> tuple[Material, list[Refusal]]:
    """Read the labelled LoRAs of a folder; with the files that cannot be used, and why.

    Raises BasisProblem, also where the feature does not fit the files (θ of several ranks) or the
    files are for another architecture than the one asked for; ValueError for an unknown group.
    """
    labelled = with_splits(read_labels(folder, labels), wanted.seed)
    opened = open_feature(
        wanted.feature,
        [one.path for one in labelled],
        wanted.groups,
        device=device,
        allow_pickle=allow_pickle,
        watch=watch,
    )
    if wanted.architecture and wanted.architecture not in kinds(opened.architecture):
        raise BasisProblem(
            f"Most LoRAs of {folder} are for {opened.architecture}, not {wanted.architecture}."
        )
    material = Material(
        opened.matrix,
        opened.architecture,
        [labelled[row] for row in opened.rows],
        opened.layouts,
        opened.digests,
        opened.contents,
        np.ones(len(opened.rows)),
        opened.frame.to_json() if opened.frame else None,
    )
    return material, opened.refused


def gather_index(
    store: Store,
    wanted: Wanted,
    labels: Path | None = None,
    by_folder: bool = False,
    watch: Progress | None = None,
) -> Material:
    """One LoRA of every family of an architecture, from the stored signatures.

    labels: a CSV file whose ``file`` is the path or name of an indexed file; by_folder: the name of
    the folder that a file lies in is its artist. With labels only labelled LoRAs are taken. Where
    there are more than SAMPLE to train on, or HELD of another split, a sample spread evenly over
    the artists stands for them.

    Raises BasisProblem where the index holds nothing of the kind; ValueError for an unknown group.
    """
    watch = watch or Silent()
    groups = parse_groups(wanted.groups)
    architecture = wanted.architecture or most_frequent(store)
    ids, layouts, families = members(store, architecture)
    if not len(ids):
        raise BasisProblem(f"The index holds no LoRA for {architecture or 'any model'}.")
    found: list[Labelled] | None = None
    if labels is not None or by_folder:
        keep, found = _labelled(store, ids, labels, by_folder)
        found = with_splits(found, wanted.seed)
        rows = _sample(found)
        ids, layouts = ids[keep][rows], layouts[keep][rows]
        found = [found[row] for row in rows.tolist()]
    else:
        first = np.unique(families, return_index=True)[1]
        if len(first) > SAMPLE:
            first = first[np.linspace(0, len(first) - 1, SAMPLE).astype(int)]
        ids, layouts = ids[first], layouts[first]
    watch.stage("Reading signatures", 1, 0)
    matrix = from_store(store, ids.tolist(), groups)
    watch.advance(1, 0)
    if not matrix.groups:
        raise BasisProblem(f"No LoRA for {architecture} changes {', '.join(groups)}.")
    used = np.unique(layouts).tolist()
    digests = dict(store.conn.execute("SELECT id, digest FROM layouts").fetchall())
    where = {layout: position for position, layout in enumerate(used)}
    contents = dict(store.conn.execute("SELECT id, content FROM loras").fetchall())
    return Material(
        matrix,
        architecture,
        found,
        np.array([where[layout] for layout in layouts.tolist()]),
        [digests[layout] for layout in used],
        [contents[lora] for lora in ids.tolist()],
        np.ones(len(ids)),
    )


def most_frequent(store: Store) -> str:
    """The architecture of most LoRAs of an index; empty where it holds none."""
    rows = store.conn.execute(
        "SELECT architecture FROM loras GROUP BY architecture ORDER BY count(*) DESC LIMIT 1"
    ).fetchall()
    return kinds(rows[0][0])[0] if rows else ""


def _labelled(
    store: Store, ids: np.ndarray, labels: Path | None, by_folder: bool
) -> tuple[np.ndarray, list[Labelled]]:
    """(which of the LoRAs have a label, their labels)."""
    by_path: dict[str, Labelled] = {}
    by_name: dict[str, list[Labelled]] = {}
    if labels is not None:
        for named in read_labels(labels.absolute().parent, labels):
            by_path[os.path.normpath(named.path)] = named
            if named.path.parent == labels.absolute().parent:
                by_name.setdefault(named.path.name, []).append(named)
    keep, found = [], []
    for row, lora in enumerate(ids.tolist()):
        for root, single, relative in store.conn.execute(
            "SELECT r.path, r.single, f.path FROM files f JOIN roots r ON r.id = f.root "
            "WHERE f.lora = ? ORDER BY f.id",
            (lora,),
        ):
            path = os.fsdecode(root if single else os.path.join(root, relative))
            label: Labelled | None
            if labels is None:
                label = Labelled(Path(path), os.path.basename(os.path.dirname(path)))
            else:
                same = by_name.get(os.path.basename(path), [])
                # A bare name stands for a LoRA only where no other has a file of that name.
                only = same[0] if len(same) == 1 and _alone(store, relative, lora) else None
                label = by_path.get(os.path.normpath(path), only)
            if label is not None:
                keep.append(row)
                found.append(label)
                break
    if not found:
        raise BasisProblem(
            f"{labels} names none of the files in the index: the column file holds paths or names."
        )
    return np.array(keep), found


def _alone(store: Store, path: bytes, lora: int) -> bool:
    """True where no other LoRA of the index has a file of this name."""
    name = os.path.basename(path)
    rows = store.conn.execute(
        "SELECT path FROM files WHERE lora != ? AND substr(path, -length(?2)) = ?2", (lora, name)
    )
    return all(os.path.basename(other) != name for (other,) in rows)


def _sample(labelled: Sequence[Labelled]) -> np.ndarray:
    """Rows that stand for all, spread over the artists of every split."""
    order: dict[tuple[str, str], int] = {}
    ranked = []
    for row, one in enumerate(labelled):
        turn = order[one.split, one.artist] = order.get((one.split, one.artist), -1) + 1
        ranked.append((one.split, turn, row))
    taken: list[int] = []
    for split in {one.split for one in labelled}:
        most = SAMPLE if split == "train" else HELD
        taken += [row for _, _, row in sorted(r for r in ranked if r[0] == split)[:most]]
    return np.array(sorted(taken))
