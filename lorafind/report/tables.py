"""The tables that ``lorafind eval`` shows to people, picked from its long table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorafind.cli.output import Column
from lorafind.evaluation.protocol import PAIRWISE, Row, usual_metric

#: split → heading.
SPLITS = {
    "train": "train",
    "validation": "val",
    "test": "test",
    "test_same": "same",
    "test_diff": "diff",
}
GROUPS = {"self_attn": "self", "cross_attn": "cross"}
BASES = {
    ("components", "none"): "PCA",
    ("components", "scale and offset"): "calibrated",
    ("components", "scale only"): "scale only",
    ("components", "without labels"): "unlabelled",
}
_NAMES = (
    Column("feature", "Feature"),
    Column("groups", "Groups"),
    Column("basis", "Basis"),
    Column("metric", "Metric"),
    Column("components", "k", "d", "right"),
)
#: One row of a table: what identifies it, and its rows by split.
Line = tuple[dict[str, Any], dict[str, Row]]


@dataclass(frozen=True)
class Table:
    """One table with its heading."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]


def tables(rows: Sequence[Row], metric: str, full: bool) -> list[Table]:
    """All tables that have a row.

    metric: of those on components; empty for the better one on validation. full: every
    combination, not only the number of components that is best on validation.
    """
    shown = list(rows) if full else picked(rows, metric)
    made = [
        _retrieval(shown, full),
        _clusters(shown),
        _unseen(shown),
        _drift([r for r in rows if r.table == "drift" and _plain(r, full)], _numbers(rows)),
        _images(shown),
        _similar(shown),
    ]
    return [table for table in made if table.rows]


def picked(rows: Sequence[Row], metric: str) -> list[Row]:
    """One number of components per combination, and one metric per calibration."""
    best = _best_metrics(rows)
    first = {row.feature: row.groups for row in reversed(rows) if row.table == "protocol"}

    def wanted(row: Row) -> bool:
        if not row.chosen or row.table == "drift":
            return False
        if row.table == "unseen":
            return row.metric == (metric or usual_metric(row.feature)) or not row.components
        if row.basis == "components" and row.table == "protocol":
            own = metric or best[row.feature, row.groups, row.calibration]
            whole = row.groups == first[row.feature] and row.calibration == "none"
            return row.metric == own or (row.metric == "csls" and whole)
        if row.metric.startswith("csls"):
            return row.metric == "csls" and row.groups == first[row.feature]
        return True

    return [row for row in rows if wanted(row)]


def _plain(row: Row, full: bool) -> bool:
    """Without offsets drift is nearly the same: shown only with everything else."""
    return full or row.calibration != "scale only"


def _numbers(rows: Iterable[Row]) -> dict[str, int]:
    """Feature → the chosen number of components, over its first groups, without calibration."""
    found: dict[str, int] = {}
    for row in rows:
        own = row.table == "protocol" and row.basis == "components" and row.chosen
        if own and row.metric == usual_metric(row.feature):
            found.setdefault(row.feature, row.components)
    return found


def _best_metrics(rows: Iterable[Row]) -> dict[tuple[str, str, str], str]:
    """(feature, groups, calibration) → the metric with the best mAP on validation."""
    found: dict[tuple[str, str, str], str] = {}
    scores: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.table != "protocol" or not row.chosen or row.basis != "components":
            continue
        key = row.feature, row.groups, row.calibration
        found.setdefault(key, usual_metric(row.feature))
        if row.split != "validation" or row.metric not in PAIRWISE or row.map is None:
            continue
        if row.map > scores.get(key, -1.0):
            scores[key], found[key] = row.map, row.metric
    return found


def _lines(rows: Iterable[Row], *keys: str) -> list[Line]:
    """Rows that differ in nothing but their split, brought together."""
    found: dict[tuple[Any, ...], Line] = {}
    for row in rows:
        own = asdict(row)
        own["groups"] = GROUPS.get(row.groups, row.groups)
        own["basis"] = BASES.get((row.basis, row.calibration), row.basis)
        own["components"] = row.components or None
        key = tuple(own[name] for name in keys)
        line = found.setdefault(key, ({name: own[name] for name in keys}, {}))
        line[1][row.split] = row
    return list(found.values())


def _figures(
    lines: Sequence[Line], figures: Sequence[tuple[str, str, Sequence[str]]]
) -> tuple[list[Column], list[dict[str, Any]]]:
    """Columns and rows of figures per split; figures: (field, heading, splits)."""
    columns, rows = [], [dict(key) for key, _ in lines]
    for field, heading, splits in figures:
        for split in splits:
            values = [getattr(by[split], field) if split in by else None for _, by in lines]
            if any(value is not None for value in values):
                name = f"{field} {split}"
                title = f"{heading}\n{SPLITS[split]}"
                columns.append(Column(name, title, ".1f", "right"))
                for row, value in zip(rows, values, strict=True):
                    row[name] = value
    return columns, rows


def _setups(lines: Sequence[Line]) -> list[str]:
    """The splits to show: the set-ups of the test LoRAs, or test as a whole."""
    have = {split for _, by in lines for split in by}
    return [split for split in ("test_same", "test_diff") if split in have] or ["test"]


def _retrieval(rows: Sequence[Row], full: bool) -> Table:
    keys = ("feature", "groups", "basis", "metric", "components", "chosen")
    wanted = [row for row in rows if row.table == "protocol" and row.map is not None]
    lines = _lines(wanted, *keys)
    tests = _setups(lines)
    figures = (
        ("map", "mAP", ("validation", *tests)),
        ("map_at", "mAP@R", tests),
        ("recall_at", "R@R", tests),
        ("genre_precision", "genre", tests),
    )
    columns, made = _figures(lines, figures)
    mark = [Column("chosen", "*", lambda chosen: "*" if chosen else "")] if full else []
    title = (
        "Retrieval, percent. mAP: over the whole ranking. mAP@R (the paper's): over the hits "
        "within the first R answers, R the LoRAs of the artist in the data base. R@R: share of "
        "them that is found there. genre: share of the query's among the first 10. calibrated, "
        "scale only: from the calibration LoRAs. unlabelled: as `similar` does it, k and all."
    )
    title += " *: best k on validation." if full else " Other k: best on validation."
    return Table(title, (*_NAMES, *mark, *columns), made)


def _clusters(rows: Sequence[Row]) -> Table:
    wanted = [row for row in rows if row.table == "protocol" and row.ari is not None]
    lines = _lines(wanted, *(column.key for column in _NAMES))
    columns: list[Column] = []
    made = [dict(key) for key, _ in lines]
    for split in ("train", "validation", "test"):
        if not any(split in by for _, by in lines):
            continue
        for figure in ("ari", "nmi"):
            name = f"{figure} {split}"
            columns.append(Column(name, f"{figure.upper()}\n{SPLITS[split]}", justify="right"))
            for line, (_, by) in zip(made, lines, strict=True):
                line[name] = _spread(by.get(split), figure)
    title = "Clusters: k-means with as many clusters as artists, percent ± sd over 10 seeds."
    return Table(title, (*_NAMES, *columns), made)


def _spread(row: Row | None, figure: str) -> str:
    if row is None or getattr(row, figure) is None:
        return ""
    return f"{getattr(row, figure):.1f} ±{getattr(row, f'{figure}_sd'):.1f}"


def _unseen(rows: Sequence[Row]) -> Table:
    wanted = [row for row in rows if row.table == "unseen"]
    lines = _lines(wanted, "feature", "basis", "metric", "components")
    tests = _setups(lines)
    figures = (
        ("map", "mAP", tests),
        ("recall_at", "R@R", tests),
        ("genre_precision", "genre", tests),
    )
    columns, made = _figures(lines, figures)
    named = [column for column in _NAMES if column.key != "groups"]
    title = (
        "Artists that the basis has not seen: data base and queries of every second artist, the "
        "others give mean and components."
    )
    return Table(title, (*named, *columns), made)


def _drift(rows: Sequence[Row], best: Mapping[str, int]) -> Table:
    """Drift per size of the training set; best: feature → number of components to show."""
    tests = _setups([({}, {row.split: row}) for row in rows])
    wanted = [r for r in rows if r.split in tests and r.components == best.get(r.feature)]
    sizes = sorted({row.per_artist for row in wanted if row.per_artist})
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in wanted:
        for figure in ("spread", "distance"):
            line = lines.setdefault(
                (row.feature, row.split, figure, row.calibration),
                {
                    "feature": row.feature,
                    "basis": BASES[row.basis, row.calibration],
                    "components": row.components,
                    "split": SPLITS[row.split],
                    "figure": figure,
                },
            )
            line[f"at {row.per_artist}"] = getattr(row, figure)
    # Figures with and without calibration stand below one another.
    order = list(dict.fromkeys(key[:3] for key in lines))
    made = sorted(lines, key=lambda key: order.index(key[:3]))
    columns = (
        *(column for column in _NAMES if column.key in ("feature", "basis", "components")),
        Column("split", "Split"),
        Column("figure", "Drift"),
        *(Column(f"at {size}", str(size), ".2f", "right") for size in sizes),
    )
    title = (
        "Drift of unseen LoRAs, by training LoRAs per artist. spread: their root mean square "
        "coordinates ÷ those of the training LoRAs (1: no drift). distance: from their artist's "
        "training mean ÷ that mean's from the centre (0: no drift)."
    )
    return Table(title, columns, [lines[key] for key in made])


def _images(rows: Sequence[Row]) -> Table:
    wanted = [row for row in rows if row.table == "images" and row.similarity is None]
    lines = _lines(wanted, "feature", "scenario")
    tests = _setups(lines)
    figures = (
        ("map", "mAP", ("validation", *tests)),
        ("map_at", "mAP@R", tests),
        ("recall_at", "R@R", tests),
        ("genre_precision", "genre", tests),
        ("ari", "ARI", ("train", "test")),
        ("nmi", "NMI", ("train", "test")),
    )
    columns, made = _figures(lines, figures)
    named = (Column("feature", "Encoder"), Column("scenario", "Pictures"))
    title = "Image features: mean over a LoRA's pictures, cosine; queries → data base."
    return Table(title, (*named, *columns), made)


def _similar(rows: Sequence[Row]) -> Table:
    named = (
        Column("feature", "Embeddings"),
        Column("scenario", "Pictures"),
        Column("components", "k", "d", "right"),
        Column("queries", "LoRAs", "d", "right"),
        Column("similarity", "Cosine", ".3f", "right"),
    )
    title = "Embedding similarity: coordinates of LoRAs against principal components of pictures."
    return Table(title, named, [asdict(row) for row in rows if row.similarity is not None])
