"""``lorafind map``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafind.cli.options import Session, command
from lorafind.cli.output import Column, Mode, nearby
from lorafind.cli.watch import Watch

if TYPE_CHECKING:
    from lorafind.map.collect import Map

COLUMNS = (
    Column("path", "File", nearby),
    Column("architecture", "Architecture"),
    Column("points", "LoRAs", justify="right"),
    Column("basis", "Basis"),
    Column("layout", "Layout"),
    Column("colours", "Colours"),
)
ENDINGS = (".html", ".htm", ".png", ".svg")


@command
def map(
    session: Session,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write: map.html, map.png or map.svg."),
    ],
    arch: Annotated[
        str,
        typer.Option(help="The architecture. Default: that of most LoRAs.", show_default=False),
    ] = "",
    basis: Annotated[
        str,
        typer.Option(
            help="Id or name of a basis of the index, or own. Default: the one in use.",
            show_default=False,
        ),
    ] = "",
    layout: Annotated[
        str,
        typer.Option(
            help="Places: components (the first of the basis, as in the paper), tsne or umap."
        ),
    ] = "components",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A CSV file of labels: file, artist and, where known, genre.", show_default=False
        ),
    ] = None,
    colour: Annotated[
        str,
        typer.Option(
            help="Colours of a picture: label, genre, group, folder, base, word or rank. Default: "
            "the first of these that tells LoRAs apart.",
            show_default=False,
        ),
    ] = "",
    groups: Annotated[
        int | None,
        typer.Option(
            "-k",
            "--groups",
            min=0,
            help="How many groups `lorafind groups` should find for colours; 0: none. Default: as "
            "many as there are dense places.",
            show_default=False,
        ),
    ] = None,
    pictures: Annotated[
        float,
        typer.Option(min=0.0, max=256.0, help="MB of previews in the page at the most; 0: none."),
    ] = 16.0,
) -> None:
    """Every LoRA of an architecture as a point: an interactive page, or a picture.

    The page is one file that opens from disk and fetches nothing. It shows the LoRAs in 2D and 3D;
    hover for name, path and preview, click for the nearest neighbours (the path is copied), search,
    go by arrow keys, and colour by folder, label, base model, rank, trigger word or group, with
    hulls and centroids. Near in the picture is a hint alone; the neighbours come from the whole
    basis, with the scores of `lorafind similar`. Labels are matched by path, else by a file name
    that only one of them has.
    """
    from lorafind.bases.labels import read_labels
    from lorafind.index.store import Store
    from lorafind.map.collect import Wishes
    from lorafind.map.points import METHODS
    from lorafind.map.write import NoSuchColour, write

    if output.suffix.lower() not in ENDINGS:
        raise typer.BadParameter(
            f"{output.name} has no ending that says what to write: take .html, .png or .svg",
            param_hint="'-o'",
        )
    if layout not in METHODS:
        raise typer.BadParameter(f"--layout is one of {', '.join(METHODS)}")
    told = read_labels(labels.parent, labels) if labels else []
    wishes = Wishes(arch, basis, layout, told, groups, int(pictures * 1e6))
    with Watch(session.sink) as watch, Store.open(session.db) as store:
        try:
            found = write(store, output, wishes, watch, colour)
        except NoSuchColour as error:
            raise typer.BadParameter(str(error), param_hint="'--colour'") from error
    _tell(session, found, labels)
    row = {
        "path": str(output.absolute()),
        "architecture": found.architecture,
        "points": len(found.points),
        "basis": found.basis,
        "layout": found.layout,
        "colours": [one.key for one in found.colourings],
        "pictures": len(found.pictures.jpegs),
        "labelled": found.matched,
        "left_out": found.left_out,
    }
    if session.sink.mode is Mode.JSON:
        session.sink.record(COLUMNS, row)
    else:
        session.sink.rows(COLUMNS, [row])


def _tell(session: Session, found: Map, labels: Path | None) -> None:
    if labels is not None:
        session.sink.note(f"{found.matched} of {len(found.points)} LoRAs have a label.")
    if found.left_out:
        session.sink.note(
            f"{found.left_out} more LoRAs are not shown: a page holds {len(found.points)}, chosen "
            "evenly."
        )
    if found.empty:
        session.sink.note(
            f"{found.empty} LoRAs of text encoders alone have no place in this basis."
        )
    if found.pictures.left_out:
        session.sink.note(f"{found.pictures.left_out} previews are left out (see --pictures).")
    for path, why in found.pictures.broken:
        session.sink.detail(f"{path}: {why}")
    if found.pictures.broken:
        session.sink.note(f"{len(found.pictures.broken)} previews cannot be shown: see --verbose.")
