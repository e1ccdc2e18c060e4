"""``lorafind eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafind.cli.errors import Code
from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, console
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.evaluation.baselines import Pictures
    from lorafind.evaluation.run import Report

#: The columns of the long table; see :class:`lorafind.evaluation.protocol.Row`.
COLUMNS = tuple(
    Column(name, name, digits=4)
    for name in (
        "table",
        "feature",
        "groups",
        "basis",
        "calibration",
        "metric",
        "components",
        "chosen",
        "split",
        "queries",
        "map",
        "map_at",
        "recall_at",
        "genre_precision",
        "ari",
        "ari_sd",
        "nmi",
        "nmi_sd",
        "per_artist",
        "spread",
        "distance",
        "scenario",
        "similarity",
    )
)


@command
def eval(
    session: Session,
    folder: Annotated[
        Path,
        typer.Argument(help="A folder of LoRAs: one sub-folder per artist, or with a labels.csv."),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file: file, artist and, where known, genre, split, images.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="With commas: style, delta, theta, canonical, style exact, delta exact (no "
            "sketches)."
        ),
    ] = "style,delta,theta,canonical",
    groups: Annotated[
        str,
        typer.Option(
            help="Combinations of groups, with commas, + within one: unet,ff,self+ff. Words: self, "
            "cross, attn, ff, conv, other, text, unet, all. Default: all of the U-Net or "
            "transformer, and each alone.",
            show_default=False,
        ),
    ] = "",
    weights: Annotated[
        str,
        typer.Option(
            help="Weights of groups in style, with commas: cross=0.7,ff=1.", show_default=False
        ),
    ] = "",
    components: Annotated[
        str,
        typer.Option(
            help="Numbers of components to try, with commas. Default: from 5 to 100.",
            show_default=False,
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            help="Show figures by cosine or euclidean (as in the paper). Default: by the better "
            "one on validation.",
            show_default=False,
        ),
    ] = "",
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Every number of components and metric, and clusters for each."
        ),
    ] = False,
    layout_means: Annotated[
        bool,
        typer.Option("--layout-means", help="Centre style on the mean of each layout, not of all."),
    ] = False,
    plots: Annotated[
        Path | None,
        typer.Option(
            help="A folder for PNG plots: mAP, scales, first two components, drift.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Pictures of the LoRAs, a sub-folder of each one's name: image features too.",
            show_default=False,
        ),
    ] = None,
    images_original: Annotated[
        Path | None,
        typer.Option(help="The same: the pictures that it was trained on.", show_default=False),
    ] = None,
    images_generated: Annotated[
        Path | None,
        typer.Option(help="The same: pictures made with it.", show_default=False),
    ] = None,
    encoders: Annotated[
        str,
        typer.Option(
            help="With commas: clip, dino, dinov2, csd; NAME=FOLDER or NAME=owner/name for your "
            "own copy."
        ),
    ] = "clip,dino,dinov2,csd",
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder to keep inner products and image features in: go on from there.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of splits that are not named, of k-means and of subsets.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read .pt, .bin and .ckpt files.")
    ] = False,
) -> int | None:
    """What features of LoRAs are worth on a labelled folder, by the paper's protocol.

    Queries look for the training LoRAs of their artist, without a basis, on principal components,
    and calibrated; LoRAs are clustered by artist. Splits come from the labels; where none are
    named, the LoRAs of every artist are divided 21 : 3 : 3 : 3 into training, calibration,
    validation and test. A terminal gets tables, every other output one long table with a row per
    combination and split; figures are percent.
    """
    from lorafind.evaluation.protocol import PAIRWISE, Settings
    from lorafind.evaluation.run import Wishes, evaluate
    from lorafind.features.opening import FEATURES
    from lorafind.signatures.device import choose

    if session.sink.mode is Mode.PATHS:
        raise typer.BadParameter("eval has no paths to write", param_hint="'-0'")
    asked = tuple(dict.fromkeys(_words(features)))
    if unknown := [name for name in asked if name not in FEATURES]:
        raise typer.BadParameter(f"{unknown[0]!r} is no feature; choose from {', '.join(FEATURES)}")
    if metric and metric not in PAIRWISE:
        raise typer.BadParameter(f"--metric is one of {', '.join(PAIRWISE)}")
    try:
        choose(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    wishes = Wishes(
        labels,
        asked,
        Settings(_combinations(groups), _numbers(components), full, seed),
        _weights(weights),
        layout_means,
        device,
        allow_pickle,
        cache,
        _pictures(images, images_original, images_generated, _words(encoders)),
    )
    if plots is not None:
        from lorafind.report.plots import draw, require

        # Not after an hour of work.
        require()
    with Watch(session.sink) as watch:
        report = evaluate(folder, wishes, watch)
        if plots is not None:
            for plot in draw(report, plots):
                session.sink.detail(f"wrote {plot}")
    for note in report.notes:
        session.sink.note(note)
    for path, reason in (*report.refused, *report.unreadable):
        session.sink.warn(reason if path in reason else f"{path}: {reason}")
    _show(session, report, metric, full)
    return Code.PARTIAL if report.refused or report.unreadable else None


def _show(session: Session, report: Report, metric: str, full: bool) -> None:
    if session.sink.mode is not Mode.TABLE:
        session.sink.rows(COLUMNS, (asdict(row) for row in report.rows))
        return
    import sys

    from lorafind.report.tables import tables

    screen = console(sys.stdout)
    for number, table in enumerate(tables(report.rows, metric, full)):
        if number:
            screen.print()
        screen.print(table.title)
        session.sink.rows(table.columns, table.rows)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _combinations(text: str) -> Mapping[str, Sequence[str]]:
    from lorafind.features.opening import parse_groups

    try:
        return {name: parse_groups(name.split("+")) for name in _words(text)}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _numbers(text: str) -> list[int]:
    numbers = [int(word) if word.isdigit() else 0 for word in _words(text)]
    if 0 in numbers:
        raise typer.BadParameter("--components takes whole numbers from 1 on, with commas")
    return numbers


def _weights(text: str) -> dict[str, float]:
    from lorafind.features.opening import parse_groups

    found: dict[str, float] = {}
    for word in _words(text):
        name, _, value = word.partition("=")
        try:
            weight = float(value)
            groups = parse_groups([name])
        except ValueError as error:
            raise typer.BadParameter(f"--weights takes pairs like cross=0.7: {error}") from error
        if not 0 <= weight < float("inf"):
            raise typer.BadParameter("--weights takes numbers from 0 on")
        found |= dict.fromkeys(groups, weight)
    return found


def _pictures(
    images: Path | None, original: Path | None, generated: Path | None, encoders: Sequence[str]
) -> Pictures | None:
    from lorafind.evaluation.baselines import Pictures

    given = {"pictures": images, "original": original, "generated": generated}
    folders = {kind: folder for kind, folder in given.items() if folder is not None}
    if images is not None and len(folders) > 1:
        raise typer.BadParameter(
            "--images stands alone: name --images-original and --images-generated for scenarios"
        )
    return Pictures(folders, encoders) if folders else None
