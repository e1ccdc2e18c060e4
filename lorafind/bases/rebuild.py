"""`rebuild-basis`: principal components of labelled LoRAs, calibrated, judged and written.

Two passes over the feature: one for the inner products, one for the components. What lies between
(splits, number of components, calibration, figures) works on the inner products alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from lorafind.bases import file, kernel
from lorafind.bases.calibration import Calibration
from lorafind.bases.checkpoint import Checkpoint
from lorafind.bases.collection import WEIGHTS
from lorafind.bases.judge import FIGURES, Judge, Line, Material, Settings
from lorafind.bases.kernel import Fitted, Kernel
from lorafind.bases.problem import BasisProblem
from lorafind.features.matrix import Matrix
from lorafind.index.progress import Progress, Silent
from lorafind.signatures.constants import SIGNATURE_VERSION

#: Components that are computed, of which the best number is kept (the paper's 100).
MOST = 100
#: Pairs of training LoRAs whose distances give the typical one.
_PAIRS = 512


@dataclass(frozen=True)
class Rebuilt:
    """A basis that was written, and what it is worth."""

    path: Path
    facts: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)

    @property
    def verdict(self) -> list[str]:
        """What it gained, in sentences."""
        found = []
        metric, calibrated = self.facts["metric"], self.facts["calibration"] != "none"
        for line in self.lines:
            if line.split == "validation":
                continue
            value = line.way(metric, calibrated)
            text = (
                f"{line.split}: mAP {value:.1f}, {value - line.plain:+.1f} points against no basis"
            )
            if calibrated:
                gain = value - line.way(metric, False)
                text += f", {gain:+.1f} against the same basis without calibration"
            found.append(f"{text}.")
        return found


def rebuild(
    material: Material, output: Path, settings: Settings, watch: Progress | None = None
) -> Rebuilt:
    """Fit, choose, calibrate, judge and write a basis.

    An interrupted run goes on from ``output`` with ``.part`` and ``.state`` behind its name. Raises
    BasisProblem where the material cannot carry a basis.
    """
    watch = watch or Silent()
    matrix = material.matrix
    train = _train(material)
    if len(train) < 3:
        raise BasisProblem(f"{len(train)} training LoRAs make no basis: three are the least.")
    if not output.parent.is_dir():
        raise BasisProblem(f"There is no folder {output.parent} to write {output.name} to.")
    checkpoint = Checkpoint(output.with_name(output.name + ".state"), matrix.fingerprint)
    products = inner_products(matrix, settings.device, watch, checkpoint)
    weights = group_weights(matrix.feature, matrix.groups)
    fitted = kernel.fit(products, material.layouts, material.weights, weights, train, MOST)
    coordinates = fitted.coordinates(products, material.layouts, fitted.size)
    judge = Judge(material, products, weights, coordinates, train)
    fix = judge.calibration(settings) if settings.calibrate and material.labels else None
    metric, k = judge.choose(fix, fitted, settings)
    lines = [judge.line(split, fix, k) for split in judge.splits]
    facts = _facts(material, settings, fitted, coordinates, fix, k, metric, train, lines)
    _write(output, material, fitted, facts, fix, k, train, watch, checkpoint)
    checkpoint.remove()
    return Rebuilt(output, facts, lines)


def inner_products(
    matrix: Matrix, device: str, watch: Progress, checkpoint: Checkpoint | None = None
) -> Kernel:
    """The first pass: the inner products of all LoRAs, group by group."""
    number = sum(len(matrix.tiles(group)) for group in matrix.groups)
    watch.stage("Inner products", number, 0)
    grams = {g: matrix.gram(g, device, watch, checkpoint) for g in matrix.groups}
    return Kernel(grams, matrix.present)


def group_weights(feature: str, groups: Sequence[str]) -> dict[str, float]:
    """ω of every group: those of the collection's basis for style, else 1 as in the paper."""
    return {g: WEIGHTS[g] if feature == "style" else 1.0 for g in groups}


def _train(material: Material) -> np.ndarray:
    if material.labels is None:
        return np.arange(material.matrix.count)
    return np.flatnonzero([one.split == "train" for one in material.labels])


def _facts(
    material: Material,
    settings: Settings,
    fitted: Fitted,
    coordinates: np.ndarray,
    fix: Calibration | None,
    k: int,
    metric: str,
    train: np.ndarray,
    lines: Sequence[Line],
) -> dict[str, Any]:
    matrix, labels = material.matrix, material.labels
    kept = coordinates[train][np.linspace(0, len(train) - 1, min(_PAIRS, len(train))).astype(int)]
    kept = kept[:, :k]
    squares = (kept**2).sum(1)
    apart = squares[:, None] + squares - 2 * kept @ kept.T
    distance = float(np.sqrt(np.median(apart[np.triu_indices(len(kept), 1)])))
    how = "none" if fix is None else "scale only" if settings.scale_only else "scale and offset"
    scales = [] if fix is None else [round(float(s), 4) for s in fix.scale[:k]]
    share = fitted.eigenvalues / max(fitted.eigenvalues.sum(), 1e-300)
    used = [material.digests[i] for i in np.unique(material.layouts[train]).tolist()]
    # Nothing that hangs on order or on the last bits of a sum: the same LoRAs and wishes make the
    # same id.
    told: list[Any] = [
        sorted(material.contents[i] for i in train),
        list(fitted.groups),
        matrix.feature,
    ]
    if fix is not None and labels is not None:
        told.append(
            sorted(
                c
                for c, one in zip(material.contents, labels, strict=True)
                if one.split == "calibration"
            )
        )
    told += [k, how, metric, settings.setup, SIGNATURE_VERSION]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return {
        "format": file.FORMAT,
        "id": digest[:8],
        "name": settings.name,
        "feature": matrix.feature,
        "groups": list(fitted.groups),
        "weights": dict(fitted.weights),
        "architecture": material.architecture,
        "base_model": settings.base_model,
        "signature_version": SIGNATURE_VERSION,
        "components": k,
        "computed": fitted.size,
        "loras": len(train),
        "artists": len({labels[i].artist for i in train}) if labels else 0,
        "calibration": how,
        "setup": settings.setup,
        "metric": metric,
        "distance": float(f"{distance:.6g}"),
        "frame": material.frame,
        "layouts": used,
        "explained_variance": [round(float(v), 6) for v in share[: fitted.size]],
        "scales": scales,
        "evaluation": [
            {
                "split": line.split,
                "queries": line.queries,
                "metric": "mAP over the whole ranking, %",
                **{
                    name: None if (value := getattr(line, name)) is None else round(value, 2)
                    for name in FIGURES
                },
            }
            for line in lines
        ],
        "licence": settings.licence,
        "data": settings.data,
        "made": datetime.now(UTC).date().isoformat(),
        "seen": len({material.contents[i] for i in train}),
    }


def _write(
    output: Path,
    material: Material,
    fitted: Fitted,
    facts: Mapping[str, Any],
    fix: Calibration | None,
    k: int,
    train: np.ndarray,
    watch: Progress,
    checkpoint: Checkpoint,
) -> None:
    """The second pass: the components, tile by tile."""
    matrix, groups = material.matrix, fitted.groups
    seen = file.contents([material.contents[i] for i in train])
    layouts = np.unique(material.layouts[train]).tolist()
    arrays: dict[str, np.ndarray] = {
        "scale": fix.scale[:k] if fix else np.ones(k),
        "offset": fix.offset[:k] if fix else np.zeros(k),
        "eigenvalues": fitted.eigenvalues,
        "contents": seen,
        "test": np.zeros(k),
    }
    for group in groups:
        index = fitted.index[group]
        rows = [index.get(layout, index[-1]) for layout in [-1, *layouts]]
        arrays[f"centres/{group}"] = fitted.centres[group][rows, :k].astype(np.float32)
        arrays[f"gram/{group}"] = fitted.grams[group][:k, :k]
    shapes: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        name: (array.dtype.type, array.shape) for name, array in arrays.items()
    }
    for group in groups:
        shapes[f"components/{group}"] = np.float16, (k, matrix.widths[group])
        shapes[f"mean/{group}"] = np.float32, (matrix.widths[group],)
    writer = file.Writer(output, shapes, facts)
    try:
        done = checkpoint.written(facts) if writer.resumed else 0
        checkpoint.wrote(facts, done, always=True)
        watch.stage("Components", sum(len(matrix.tiles(g)) for g in groups), 0)
        position = 0
        for group in groups:
            mix = fitted.mix[group][:k].astype(np.float32)
            mean = fitted.averages[group][0].astype(np.float32)
            start = min(max(done - position, 0), len(matrix.tiles(group)))
            position += start
            watch.advance(start, 0)
            for tile, block in matrix.walk(group, start):
                rows_of = block if len(train) == len(block) else block[train]
                writer.write_columns(f"components/{group}", tile, mix @ rows_of)
                writer.write_columns(f"mean/{group}", tile, (mean @ rows_of)[None])
                position += 1
                checkpoint.wrote(facts, position)
                watch.advance(1, block.nbytes)
        for name, array in arrays.items():
            writer.write(name, array)
        writer.write("test", file.test_coordinates(file.load(writer.part)))
        writer.commit()
    finally:
        writer.close()
