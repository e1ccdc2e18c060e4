"""Image features as rivals of weights: what retrieval and clusters are by pictures of the LoRAs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorafind.bases import metrics
from lorafind.bases.labels import Labelled
from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.images import Features, embedding_similarity, image_features, scenarios
from lorafind.evaluation.protocol import Row, Space
from lorafind.evaluation.scoring import unit
from lorafind.index.progress import Progress


@dataclass(frozen=True)
class Pictures:
    """Where pictures are: kind (``original``, ``generated``, or ``images``) → folder; encoders."""

    folders: Mapping[str, Path]
    encoders: Sequence[str]


def picture_names(labels: Sequence[Labelled]) -> list[str]:
    """What the folder of pictures of every LoRA is called.

    The file's name without suffix, with the artist before it where that is not enough.
    """
    stems = Counter(one.path.stem for one in labels)
    return [
        one.path.stem if stems[one.path.stem] == 1 else f"{one.artist}/{one.path.stem}"
        for one in labels
    ]


def described(
    pictures: Pictures,
    encoder: str,
    labels: Sequence[Labelled],
    device: str,
    cache: Path | None,
    watch: Progress,
) -> dict[str, Features]:
    """The features of all LoRAs by one encoder, per kind of pictures."""
    from lorafind.evaluation.encoders import open_encoder

    opened = open_encoder(encoder, device)
    names = picture_names(labels)
    return {
        kind: image_features(opened, folder, names, device, cache, watch)
        for kind, folder in pictures.folders.items()
    }


def retrieved(
    encoder: str, kinds: Mapping[str, Features], labels: Sequence[Labelled], seed: int
) -> list[Row]:
    """Retrieval per scenario and split, and clusters per kind and split.

    Cosine of mean features; the data base is the training LoRAs, as for weights. Raises
    BasisProblem where none of these has pictures.
    """
    names = picture_names(labels)
    label_of = dict(zip(names, labels, strict=True))
    base = [n for n in names if label_of[n].split == "train"]
    pictured = set.intersection(*(set(features.rows) for features in kinds.values()))
    rows = []
    for split in ("validation", "test", "test_same", "test_diff"):
        asking = [n for n in names if n in pictured and _in(label_of[n], split)]
        if not asking:
            continue
        for one in scenarios(kinds, asking, base):
            ours = np.array([label_of[n].artist for n in one.queries])
            theirs = np.array([label_of[n].artist for n in one.candidates])
            genre = np.array([label_of[n].genre for n in one.queries])
            genres = np.array([label_of[n].genre for n in one.candidates])
            alike = (genre[:, None] == genres) & (genre != "")[:, None]
            found = metrics.retrieval(
                one.cosines, ours[:, None] == theirs, alike if alike.any() else None
            )
            called = f"{one.query} → {one.base}" if len(kinds) > 1 else one.query
            row = Row("images", encoder, "", "images", "none", "cosine", split=split)
            rows.append(replace(row, scenario=called).found(found))
    for kind, features in kinds.items():
        for split in ("train", "validation", "test", "test_same", "test_diff"):
            some = [n for n in names if _in(label_of[n], split) and n in features.rows]
            if not some:
                continue
            points = unit(features.matrix(some).astype(np.float64))
            made = metrics.clusters(points, [label_of[n].artist for n in some], seed)
            if made is not None:
                row = Row("images", encoder, "", "images", "none", "cosine", split=split)
                row = replace(row, scenario=kind, queries=len(some))
                rows.append(row.clustered(made))
    return rows


def resemblance(
    encoder: str,
    kinds: Mapping[str, Features],
    space: Space,
    components: int,
    tell: Callable[[str], None],
) -> list[Row]:
    """The paper's embedding similarity of the training LoRAs: their coordinates and their images.

    The mean over LoRAs of :func:`lorafind.evaluation.images.embedding_similarity`. tell: gets a
    sentence where it cannot be had.
    """
    subject = space.subject
    names = picture_names(subject.labels)
    rows = []
    for kind, features in kinds.items():
        some = [i for i in space.train.tolist() if names[i] in features.rows]
        try:
            found = embedding_similarity(
                space.coordinates(components)[some], features.matrix([names[i] for i in some])
            )
        except BasisProblem as error:
            tell(f"{subject.feature} × {encoder}, {kind}: {error}")
            continue
        row = Row("images", f"{subject.feature} × {encoder}", "all", "components", "none", "cosine")
        rows.append(
            replace(
                row,
                components=found.components,
                split="train",
                queries=len(some),
                scenario=kind,
                similarity=found.mean,
            )
        )
    return rows


def _in(one: Labelled, split: str) -> bool:
    return one.split.startswith("test") if split == "test" else one.split == split
