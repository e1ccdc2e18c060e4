"""`eval`: what features of LoRAs are worth on a labelled folder, by the paper's protocol."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafind.bases.checkpoint import Checkpoint
from lorafind.bases.kernel import Kernel
from lorafind.bases.labels import Labelled, read_labels, with_splits
from lorafind.bases.problem import BasisProblem
from lorafind.bases.rebuild import group_weights, inner_products
from lorafind.evaluation import baselines
from lorafind.evaluation.baselines import Pictures
from lorafind.evaluation.drift import drift
from lorafind.evaluation.protocol import (
    DIRECTIONS,
    Row,
    Settings,
    Space,
    combinations,
    protocol,
    usual_metric,
)
from lorafind.evaluation.scoring import Subject
from lorafind.evaluation.unseen import unseen
from lorafind.features.opening import Opened, open_feature
from lorafind.index.progress import Progress, Silent

if TYPE_CHECKING:
    from lorafind.evaluation.images import Features

#: What is evaluated unless told otherwise.
FEATURES = ("style", "delta", "theta", "canonical")


@dataclass(frozen=True)
class Wishes:
    """What to evaluate.

    labels: a CSV file, None for ``labels.csv`` or sub-folders; features: names of
    :data:`lorafind.features.opening.FEATURES`; weights: ω of groups in place of the usual ones for
    style; layout_means: style is centred on the mean of every layout, as in the index, and not on
    one mean of all; cache: a folder in which inner products are kept, so that an interrupted run
    goes on and a second one need not multiply again; pictures: image features to compare with.
    """

    labels: Path | None = None
    features: Sequence[str] = FEATURES
    settings: Settings = field(default_factory=Settings)
    weights: Mapping[str, float] = field(default_factory=dict)
    layout_means: bool = False
    device: str = "cpu"
    allow_pickle: bool = False
    cache: Path | None = None
    pictures: Pictures | None = None


@dataclass(frozen=True)
class Sight:
    """What plots show of a feature, over all groups.

    scales: calibration → s_k; places: n × 2, the first two coordinates, uncalibrated; the labels
    of the n LoRAs; components: the number that is best on validation, uncalibrated.
    """

    feature: str
    scales: Mapping[str, np.ndarray]
    places: np.ndarray
    labels: Sequence[Labelled]
    components: int


@dataclass
class Report:
    """All that was found. notes: sentences; refused: (path, sentence) of files that are left out;
    unreadable: (path, why) of pictures.
    """

    rows: list[Row] = field(default_factory=list)
    sights: list[Sight] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def evaluate(folder: Path, wishes: Wishes, watch: Progress | None = None) -> Report:
    """Evaluate features on the LoRAs of a labelled folder.

    A file that cannot be read is left out of all, and a feature that does not fit is left out with
    a note. Raises BasisProblem where nothing is labelled, no feature fits, or fewer than three
    LoRAs train; ValueError for an unknown feature or device.
    """
    from lorafind.signatures.device import choose

    watch = watch or Silent()
    report = Report()
    wishes = replace(wishes, device=choose(wishes.device).type)
    labels = with_splits(read_labels(folder, wishes.labels), wishes.settings.seed)
    report.notes.append(_counted(labels))
    described = {}
    if wishes.pictures is not None:
        # First, so that an encoder that cannot be had is told before hours of other work.
        described = _described(wishes.pictures, labels, wishes, report, watch)
    spaces, unfit = [], []
    for feature in wishes.features:
        try:
            subject = open_subject(feature, labels, wishes, report, watch)
        except BasisProblem as error:
            unfit.append(f"{feature} is left out: {error}")
            continue
        spaces.append(_evaluated(subject, wishes.settings, report, watch))
    if not spaces:
        raise BasisProblem(" ".join(unfit) or "No feature was asked for.")
    report.notes += unfit
    for encoder, kinds in described.items():
        for space, sight in zip(spaces, report.sights, strict=True):
            report.rows += baselines.resemblance(
                encoder, kinds, space, sight.components, report.notes.append
            )
    return report


def open_subject(
    feature: str, labels: Sequence[Labelled], wishes: Wishes, report: Report, watch: Progress
) -> Subject:
    """A feature of the labelled LoRAs that can be read, with all inner products.

    θ of several ranks or layouts is filled up with zeros, with a note.
    """
    opened = _opened(feature, labels, wishes, report, watch)
    for refusal in opened.refused:
        if refusal not in report.refused:
            report.refused.append(refusal)
    own = [labels[i] for i in opened.rows]
    trained = sum(one.split == "train" for one in own)
    if trained < 3:
        raise BasisProblem(f"{trained} training LoRAs are too few: three are the least.")
    checkpoint = None
    if wishes.cache is not None:
        wishes.cache.mkdir(parents=True, exist_ok=True)
        name = f"{feature.replace(' ', '-')}-{opened.matrix.fingerprint[:16]}.npz"
        checkpoint = Checkpoint(wishes.cache / name, opened.matrix.fingerprint)
    products = inner_products(opened.matrix, wishes.device, watch, checkpoint)
    layouts = opened.layouts if wishes.layout_means else np.zeros_like(opened.layouts)
    return subject_of(feature, products, own, layouts, opened.contents, wishes.weights)


def subject_of(
    feature: str,
    products: Kernel,
    labels: Sequence[Labelled],
    layouts: np.ndarray,
    contents: Sequence[str],
    weights: Mapping[str, float] | None = None,
) -> Subject:
    """Inner products as they are compared.

    Style: unit length per group, a mean per layout (n ids, all equal for one mean), groups
    weighted; a group that a LoRA lacks is left out. The others as they are: one mean, equal
    weights, and a group that a LoRA lacks is zero there, as its ΔW is.
    """
    usual = group_weights("style" if feature in DIRECTIONS else feature, products.groups)
    if feature in DIRECTIONS:
        own = {g: (weights or {}).get(g, w) for g, w in usual.items()}
        return Subject(feature, products.unit(), labels, layouts, own, contents)
    everywhere = {g: np.ones(products.count, bool) for g in products.groups}
    filled = Kernel(products.grams, everywhere)
    return Subject(feature, filled, labels, np.zeros_like(layouts), usual, contents)


def _opened(
    feature: str, labels: Sequence[Labelled], wishes: Wishes, report: Report, watch: Progress
) -> Opened:
    paths = [one.path for one in labels]
    wanted = wishes.settings.groups.values()
    groups = tuple(dict.fromkeys(g for combination in wanted for g in combination))

    def attempt(pad: bool) -> Opened:
        return open_feature(
            feature,
            paths,
            groups,
            pad=pad,
            device=wishes.device,
            allow_pickle=wishes.allow_pickle,
            watch=watch,
        )

    if feature != "theta":
        return attempt(False)
    try:
        return attempt(False)
    except BasisProblem as error:
        opened = attempt(True)
        report.notes.append(f"theta is filled up with zeros, since it does not fit: {error}")
        return opened


def _counted(labels: Sequence[Labelled]) -> str:
    splits = Counter(one.split for one in labels)
    said = ", ".join(f"{number} {split}" for split, number in splits.items())
    return f"{len(labels)} LoRAs of {len({one.artist for one in labels})} artists: {said}."


def _evaluated(subject: Subject, settings: Settings, report: Report, watch: Progress) -> Space:
    """All tables of one feature into the report; the space of its first combination of groups."""
    _copies(subject, report)
    made = combinations(subject, settings)
    rows = []
    for name, groups in made.items():
        rows += protocol(subject.only(groups), settings, name, watch)
    first = next(iter(made))
    whole = subject.only(made[first])
    found = [*unseen(whole, settings), *drift(whole, settings, watch)]
    report.rows += rows + [replace(row, groups=first) for row in found]
    space = Space(whole, whole.rows("train"))
    scales: dict[str, np.ndarray] = {
        kind: space.calibration(kind, space.size).scale
        for kind in ("scale and offset", "scale only")
        if kind in space.kinds
    }
    places = space.coordinates(min(2, space.size))
    best = best_number(rows, subject.feature, first) or space.size
    report.sights.append(Sight(subject.feature, scales, places, whole.labels, best))
    return space


def best_number(rows: Sequence[Row], feature: str, groups: str) -> int | None:
    """The chosen number of components without calibration, by the metric usual for the feature."""
    wanted = (feature, groups, "components", "none", usual_metric(feature), True)
    for row in rows:
        own = (row.feature, row.groups, row.basis, row.calibration, row.metric, row.chosen)
        if own == wanted:
            return row.components
    return None


def _copies(subject: Subject, report: Report) -> None:
    trained = {subject.contents[i] for i in subject.rows("train").tolist()}
    asking = [i for split in ("validation", "test") for i in subject.rows(split).tolist()]
    if known := sum(subject.contents[i] in trained for i in asking):
        sentence = f"{known} queries are copies of training LoRAs, which makes them easy to find."
        if sentence not in report.notes:
            report.notes.append(sentence)


def _described(
    pictures: Pictures,
    labels: Sequence[Labelled],
    wishes: Wishes,
    report: Report,
    watch: Progress,
) -> dict[str, dict[str, Features]]:
    """Encoder → kind of pictures → image features of the LoRAs; their tables into the report."""
    found = {}
    short = [encoder.partition("=")[0] for encoder in pictures.encoders]
    for encoder, name in zip(pictures.encoders, short, strict=True):
        name = name if short.count(name) == 1 else encoder
        kinds = baselines.described(pictures, encoder, labels, wishes.device, wishes.cache, watch)
        for kind, features in kinds.items():
            report.unreadable += [(os.fspath(path), why) for path, why in features.unreadable]
            if features.missing:
                report.notes.append(
                    f"{name}: {len(features.missing)} of {len(labels)} LoRAs have no pictures in "
                    f"{pictures.folders[kind]} and are left out."
                )
        report.rows += baselines.retrieved(name, kinds, labels, wishes.settings.seed)
        found[name] = kinds
    return found
